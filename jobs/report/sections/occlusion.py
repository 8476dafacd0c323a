"""Occlusion: which parts of images a classifier goes by (nn_models/explaining.py)."""

from typing import Any, NamedTuple

import numpy as np

from jobs.report.confusion import class_namer
from jobs.report.files import AbsentError
from jobs.report.pictures import data_uri, heat, pictures
from jobs.report.sections.section import EVALUATION, Run, Section

MOST_IMAGES = 16
LEAST_SCALE = 0.01  # of a probability: what is less is not to look like much


class Explained(NamedTuple):
    """An image, what its prediction goes by, and the classes by name."""

    picture: str
    map: str
    predicted: str
    true: str
    most: str  # that is lost of the probability anywhere, in points: what the full colour is


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    if "occlusion/maps" not in tensors:
        return {}  # the rows are no images, or too large ones
    images, maps = (tensors[f"occlusion/{name}"][:MOST_IMAGES] for name in ("images", "maps"))
    if images.ndim != 4 or maps.shape != (len(images), *images.shape[2:]):
        raise AbsentError(f"images of shape {images.shape} and maps of shape {maps.shape}")
    maps = np.nan_to_num(maps.astype(np.float32))
    class_name = class_namer(tensors)
    told = (tensors[f"occlusion/{name}"][:MOST_IMAGES].tolist() for name in ("predictions", "targets"))
    shown = images if images.dtype == np.uint8 else _bytes(images)
    rows = []
    for picture, image, values, (predicted, true) in zip(
        pictures(images), shown, maps, zip(*told, strict=True), strict=True
    ):
        most = float(np.abs(values).max())
        map_ = data_uri(heat(image, values, most=max(LEAST_SCALE, most)))
        rows.append(Explained(picture, map_, class_name(predicted), class_name(true), f"{100 * most:.2g}"))
    return {"split": tensors.metadata.get("split", "test"), "rows": rows}


def _bytes(images: Any) -> Any:
    low, high = np.nanmin(images), np.nanmax(images)
    return np.nan_to_num((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


SECTION = Section(name="occlusion", template="occlusion.html", read=_read, title="What it goes by", file=EVALUATION)
