"""Identity: what a run must find again when it goes on: the rows of its splits, and what they hold."""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from cluster.data.manifest import Manifest

OTHER_VALUES = "to as many rows with other values, or in another order or split"


def described_rows(manifest: Manifest) -> str:
    """What places in the order of rows, and a model's inputs and outputs, refer to."""
    signature = manifest.signature
    row = signature["input"].extent
    if "target" in signature and signature["target"].predicted:
        row += f" with {signature.num_outputs}{' standardised' * bool(manifest.columns['target'].mean)} outputs"
    return f"{manifest.rows('train')} rows of {row}"


def data_facts(manifest: Manifest) -> dict[str, str]:
    """What stays the same where prepared data moves, and differs where anything in it does; for JSON."""
    shards = {split: [shard.sha256 for shard in shards] for split, shards in manifest.splits.items()}
    # without defaults: a field that a later version adds does not make other data of it
    columns = {
        name: [stored.column.kind, stored.dtype, stored.column.model_dump(mode="json", exclude_defaults=True)]
        for name, stored in manifest.columns.items()
    }
    return {"rows": described_rows(manifest), "columns": _digest(columns), "checksums": _digest(shards)}


def other_data(known: Mapping[str, Any], manifest: Manifest) -> str | None:
    """In words how the data differs from what is known of a run's; None where it does not.

    Of runs of earlier versions only the number of rows may be known.
    """
    found = data_facts(manifest)
    differs = [name for name, value in found.items() if name in known and known[name] != value]
    if "rows" in differs:
        return f"from {known['rows']} to {found['rows']}"
    if "columns" in differs:
        return "to as many rows with other columns or other names of their classes"
    return OTHER_VALUES if differs else None


def other_training_rows(saved: Manifest, manifest: Manifest) -> str | None:
    """The same for a run of an earlier version, of which the manifest beside its weights is what is left.

    Other training rows have another mean, even where they are as many.
    """
    if saved.class_names != manifest.class_names:
        return "to other names of the classes"
    for name, column in saved.columns.items():
        found = manifest.columns.get(name)
        if found is None or not _close(column.mean, found.mean) or not _close(column.std, found.std):
            return OTHER_VALUES
    return None


def _close(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether they are equal but for how another machine rounds sums in float64."""
    return len(one) == len(other) and all(map(partial(math.isclose, rel_tol=1e-9, abs_tol=1e-12), one, other))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
