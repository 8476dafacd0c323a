"""Samples: the grids of what a generator made of the same noise at each look, from the untrained one to the last."""

import base64
import io
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from cluster.storage import Folder
from jobs.report.charts import figure, number, words
from jobs.report.files import AbsentError, is_number, left_out

FOLDER = "samples"
COLUMNS = 10  # of a grid that is no grid of pairs
MAX_GRIDS = 6  # in the row of time; the best generator's is shown large above
MAX_BYTES = 250_000  # a larger file becomes a JPEG, of at most so many pixels a side
MAX_SIDE = 1000
MAX_PIXELS = 50_000_000  # of a picture that is opened at all


class Sample(NamedTuple):
    """A grid with what is known of the generator that made it."""

    picture: str  # data URI
    step: int
    when: str
    quality: str  # a metric with its value
    best: bool


def read_samples(
    folder: Folder,
    records: Sequence[Mapping[str, Any]],
    notes: list[str],
    *,
    best_step: Any,
    epoch_steps: float,
    told: Sequence[str],
) -> dict[str, Any]:
    """What the page shows of RUN/samples: {"best": Sample or None, "over_time": [Sample, …], "num_looks"}.

    Beside each grid stands the first of the metrics `told` that its look has.
    """
    page: dict[str, Any] = {"best": None, "over_time": [], "num_looks": 0}
    with left_out(notes, "The samples", file=FOLDER):
        named = ((re.fullmatch(r"step-(\d{1,15})\.png", name), name) for name in (folder / FOLDER).names())
        files = {int(match[1]): name for match, name in named if match}
        if not files:
            raise AbsentError(f"the run has no pictures in {FOLDER}/")
        looks = {
            record["step"]: record
            for record in records
            if record.get("split") == "validation" and float(record["step"]).is_integer()
        }
        best = int(best_step) if is_number(best_step) and best_step in files else None
        if best is None:
            notes.append(f"The best generator's samples: {FOLDER}/ has no picture of its step.")
        found: dict[int, Sample] = {}
        for step in spread(sorted(files), best):
            with left_out(notes, "A picture", file=f"{FOLDER}/{files[step]}"):
                found[step] = Sample(
                    picture=_embedded((folder / FOLDER).read_bytes(files[step])),
                    step=step,
                    when=_when(step, epoch_steps),
                    quality=_quality(looks.get(step, {}), told),
                    best=step == best,
                )
        page = {"best": found.get(best) if best is not None else None, "over_time": list(found.values())}
        page["num_looks"] = len(files)
    return page


def spread(steps: Sequence[int], best: int | None) -> list[int]:
    """At most MAX_GRIDS of the ascending steps: the first, the best, the last, the others evenly between."""
    if len(steps) <= MAX_GRIDS:
        return list(steps)
    places = [round(number * (len(steps) - 1) / (MAX_GRIDS - 1)) for number in range(MAX_GRIDS)]
    chosen = [steps[place] for place in places]
    if best is not None and best not in chosen:
        nearest = min(range(1, MAX_GRIDS - 1), key=lambda number: abs(chosen[number] - best))
        chosen[nearest] = best
    return sorted(chosen)


def _when(step: int, epoch_steps: float) -> str:
    if not step:
        return "untrained"
    epoch = f", epoch {math.ceil(step / epoch_steps - 1e-9)}" if epoch_steps else ""
    return f"step {number(step)}{epoch}"


def _quality(look: Mapping[str, Any], told: Sequence[str]) -> str:
    for name in told:
        if is_number(look.get(name)):
            return f"{words(name)} {figure(name, look[name])}"
    return ""


def _embedded(content: bytes) -> str:
    """A PNG file as a data URI, large ones smaller. Raises ValueError for what is no picture."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image.load()
            kind = "png"
            if len(content) > MAX_BYTES:
                kind, small, buffer = "jpeg", image.convert("RGB"), io.BytesIO()
                small.thumbnail((MAX_SIDE, MAX_SIDE))
                small.save(buffer, "jpeg", quality=85)
                content = buffer.getvalue()
    # what PIL lets out for damaged files
    except (OSError, SyntaxError, zlib.error, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable picture: {error}") from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
