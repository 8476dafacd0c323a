"""Components: what a linear autoencoder has in common with PCA: the error, the subspace, and its directions."""

from typing import Any

import numpy as np
import torch

from jobs.report.charts import number
from jobs.report.files import left_out, mapping
from jobs.report.pictures import BLUE, RED, Array, data_uri, example_shape
from jobs.report.sections.numbers import compared
from jobs.report.sections.section import EVALUATION, Run, Section
from nn_models.autoencoder import principal_angles

MAX_PICTURES = 32
WHO = {"the linear autoencoder": "", "PCA": "pca_"}


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    if "components/decoder" not in tensors or "pca.components" not in tensors:
        return {}
    with left_out(run.notes, "The components", file=tensors.name):
        ours, theirs = tensors["components/decoder"].astype(np.float64), tensors["pca.components"].astype(np.float64)
        angles = principal_angles(torch.from_numpy(ours.T.copy()), torch.from_numpy(theirs.T.copy())).tolist()
        shape = example_shape(tensors)
        pictured = shape is not None and np.prod(shape) == ours.shape[1] and shape[0] == 1
        return {
            "size": len(ours),
            "compared": compared(mapping(run.result.get("metrics")), WHO, ("mse",)),
            "largest": number(angles[0]),
            "smallest": number(angles[-1]),
            "angles": [number(angle) for angle in angles],
            "theirs": _pictures(theirs, shape) if pictured and shape else [],
            "rotated": _pictures(rotated_onto(ours, theirs), shape) if pictured and shape else [],
        }
    return {}


def rotated_onto(ours: Array, theirs: Array) -> Array:
    """An orthonormal basis of the span of the rows of `ours` (K, D), turned to be nearest to the rows of `theirs`.

    The orthogonal Procrustes problem (Schoenemann 1966): R = U V^T of Q^T P^T = U S V^T.
    """
    basis, _ = np.linalg.qr(ours.T)
    left, _, right = np.linalg.svd(basis.T @ theirs.T)
    turned: Array = (basis @ left @ right).T
    return turned


def _pictures(rows: Array, shape: tuple[int, ...]) -> list[str]:
    """Each row as a picture: blue where it is positive, red where negative, all at one scale."""
    rows = rows[:MAX_PICTURES].reshape(-1, *shape[1:])
    scale = float(np.quantile(np.abs(rows), 0.995)) or 1.0
    rows = np.clip(rows / scale, -1, 1)
    pixels = np.empty((*rows.shape, 4), np.uint8)
    pixels[..., :3] = np.where(rows[..., None] > 0, BLUE, RED)
    pixels[..., 3] = 255 * np.abs(rows)
    return [data_uri(picture) for picture in pixels]


SECTION = Section(name="components", template="components.html", read=_read, title="The components", file=EVALUATION)
