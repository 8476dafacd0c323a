"""A picture of what an image classifier goes by: `manta predict --explain`."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.inference.explain import check_explained, explain
from cluster.pictures import grid
from cluster.storage import Folder
from jobs.commands.places import place_of, refuse_existing, write_whole
from jobs.report.pictures import heat
from nn_models.errors import UserError

if TYPE_CHECKING:
    from cluster.inference.predictions import Prediction

MOST_IMAGES = 64  # of one picture; each takes 65 times as long as predicting it
COLUMNS = 8  # of images and what they are explained by, side by side
OPTION = {"--out": "--explain"}


def explained_place(out: str, prediction: "Prediction", *, overwrite: bool) -> tuple[Folder, str]:
    """Where the picture shall go. Raises UserError where it cannot, and for rows or a model that have none."""
    check_explained(prediction.model)
    if prediction.streamed:
        raise UserError("--explain", "standard input is read once", "give the rows as a file")
    try:
        place = place_of(out, (".png",), what="a PNG file")
        refuse_existing(place, overwrite=overwrite)
    except UserError as error:
        raise error.moved(OPTION) from None
    return place


def write_explained(prediction: "Prediction", place: tuple[Folder, str], *, out: str) -> str:
    """Write the first images, each beside what its predicted class goes by, and return where that is.

    Blue: the class is less probable where this part is hidden; red: more probable. Each image has its own full colour.
    """
    images = _first(prediction)
    shown = list[NDArray[Any]]()
    for image, values in zip(images, explain(prediction.model, images).maps, strict=True):
        plain = image[:3] if len(image) >= 3 else image[:1].repeat(3, 0)
        shown += [plain, heat(image, values, most=float(np.abs(values).max())).transpose(2, 0, 1)]
    try:
        return write_whole(place, grid(shown, columns=COLUMNS), out=out)
    except UserError as error:
        raise error.moved(OPTION) from None


def _first(prediction: "Prediction") -> NDArray[Any]:
    found, number = list[NDArray[Any]](), 0
    for part in prediction.rows.parts:
        for piece in prediction.rows.read(part):
            found.append(piece.between(0, MOST_IMAGES - number).input)
            number += len(found[-1])
            if number >= MOST_IMAGES:
                return np.concatenate(found)
    return np.concatenate(found)
