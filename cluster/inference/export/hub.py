"""safetensors-hub: a folder to share, that `open_model` reads: weights, recipe, and a card that says what they are."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from cluster.errors import RunFailed
from cluster.inference.export.card import card
from cluster.inference.export.check import largest_difference, refuse_noise
from cluster.inference.export.graph import graph_of
from cluster.runs.opened import open_model
from cluster.runs.predictor import OpenedModel
from cluster.storage import Folder
from cluster.training.checkpoints import WEIGHTS
from cluster.training.run_directory import RECIPE, RunDirectory
from nn_models.errors import UserError

CARD = "README.md"
FILES = (CARD, f"model/{RECIPE}", f"model/{WEIGHTS}")
NAMES = {name.partition("/")[0] for name in FILES}  # in the folder itself


def hub_files(run: str) -> tuple[dict[str, bytes], float]:
    """The folder's files by name, and the largest difference of what they give from what the run's model gives.

    Raises UserError where the run has no model, RunFailed where the files do not hold it.
    """
    folder, model = Folder(run), open_model(run)
    files = {name: folder.read_bytes(name) for name in FILES if name != CARD}
    files[CARD] = card(model, RunDirectory(folder).result()).encode()
    return files, _difference(run, model, files)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write these files below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _difference(run: str, model: OpenedModel, files: Mapping[str, bytes]) -> float:
    """Of the model that is opened from the files: its weights, and what it gives where that can be compared."""
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        write_files(Path(folder), files)
        again = open_model(folder)
    there, here = model.net.state_dict(), again.net.state_dict()
    if any(not torch.equal(there[name], here[name]) for name in there):
        raise RunFailed(f"{run}: the weights in the folder are others; nothing was written")
    try:
        graph, other = graph_of(model), graph_of(again)
        refuse_noise(graph)
    except UserError:  # no graph, but the same weights
        return 0.0
    return largest_difference(graph, lambda rows: list(other(*rows)))
