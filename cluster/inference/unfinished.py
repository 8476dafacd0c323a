"""Unfinished: the parts of a prediction that is under way, in a folder beside its file, from which it can go on."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load
from torch import Tensor

from cluster.data.tables import ParquetFile, UnreadableError
from cluster.inference.predictions import Counted, Found
from cluster.storage import Folder
from cluster.training.checkpoints import packed
from nn_models.errors import UserError
from nn_models.objectives import Measured

DESCRIPTION = "prediction.json"
TABLE, COUNTED = ".parquet", ".safetensors"


class UnfinishedPrediction:
    """A folder of parts that are done: of each a Parquet file of its rows, and what figures are made of.

    A part is there once its Parquet file is, which comes last and appears whole or not at all.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def begin(self, of: Mapping[str, Any], *, overwrite: bool) -> set[int]:
        """Begin such a prediction, or go on with it where it is the same: the parts that are done.

        Raises UserError where another prediction stands there, but with `overwrite`, which deletes it.
        """
        wanted = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        if self.folder.exists(DESCRIPTION):
            if self.folder.read_as(DESCRIPTION, dict[str, Any]).get("sha256") == wanted:
                names = {name for name, info in self.folder.walk() if info.is_file}
                return {int(name.removesuffix(TABLE)) for name in names if _is_part(name)}
            if not overwrite:
                what = "an unfinished prediction by another model, of other rows or with other options"
                raise UserError(
                    "--out", f"{self.folder} holds {what}", "give --overwrite to delete it, or another name"
                )
            self.folder.delete()
        elif self.folder.exists() and self.folder.names():
            raise UserError("--out", f"{self.folder} is there, and holds no prediction", "move it away")
        self.folder.create()
        self.folder.write_json(DESCRIPTION, {"sha256": wanted, **of})
        return set()

    def keep(self, number: int, table: bytes, counted: bytes) -> None:
        """Write a part that is done."""
        if counted:
            self.folder.write_bytes(_name(number, COUNTED), counted)
        self.folder.write_bytes(_name(number, TABLE), table)

    def found(self, number: int) -> Found:
        """A part that is done. Raises UserError where it is damaged."""
        path = f"{self.folder}/{_name(number, TABLE)}"
        try:
            file = ParquetFile(pa.BufferReader(self.folder.read_buffer(_name(number, TABLE))))
            table = file.read(file.schema.names)
            counted = self.folder.read_bytes(_name(number, COUNTED)) if self._has_counted(number) else b""
            return Found(table, tuple(unpacked(counted)))
        except (UnreadableError, FileNotFoundError, ValueError) as error:
            raise UserError(path, f"damaged ({error})", "delete it, and it is predicted again") from None

    def _has_counted(self, number: int) -> bool:
        return self.folder.exists(_name(number, COUNTED))

    def delete(self) -> None:
        """All of it, once the file is there."""
        self.folder.delete()


def _name(number: int, ending: str) -> str:
    return f"{number:06}{ending}"


def _is_part(name: str) -> bool:
    return name.endswith(TABLE) and name.removesuffix(TABLE).isdecimal()


def written(table: pa.Table) -> bytes:
    """A part's rows as the content of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def packed_counts(counted: Sequence[Counted]) -> bytes:
    """What was counted, batch after batch, as the content of a safetensors file; nothing where nothing was."""
    if not counted:
        return b""
    measured = [one.measured for one in counted]
    found: dict[str, Tensor] = {
        "weight": torch.tensor([one.weight for one in counted], dtype=torch.float64),
        "rows": torch.tensor([len(one.ids) for one in counted]),
        "ids": torch.from_numpy(np.concatenate([one.ids for one in counted])),
        "loss": torch.stack([one.loss for one in measured]).cpu(),
        "sums": torch.stack([one.sums for one in measured]).cpu(),
    }
    if measured[0].counts is not None:
        found["counts"] = torch.stack([one.counts for one in measured if one.counts is not None]).cpu()
    if measured[0].outputs is not None:
        found["outputs"] = torch.cat([one.outputs for one in measured]).cpu()
        found["target"] = torch.cat([one.target for one in counted]).cpu()
    return packed({name: values.contiguous() for name, values in found.items()}, {"holds": "counts"})


def unpacked(content: bytes) -> Iterator[Counted]:
    """The same batches again. Raises ValueError for damaged content."""
    if not content:
        return
    try:
        found = load(content)
    except Exception as error:  # safetensors has an exception of its own
        raise ValueError(str(error)) from None
    sizes = found["rows"].tolist()
    rows = {name: found[name].split(sizes) for name in ("ids", "outputs", "target") if name in found}
    for place, weight in enumerate(found["weight"].tolist()):
        outputs, target = (rows[name][place] if name in rows else None for name in ("outputs", "target"))
        counts = found["counts"][place] if "counts" in found else None
        measured = Measured(found["loss"][place], found["sums"][place], counts, outputs)
        yield Counted(weight, measured, rows["ids"][place].numpy(), target)
