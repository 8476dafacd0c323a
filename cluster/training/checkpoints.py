"""Checkpoints of a run and its best weights: written whole by a background thread, read without running code."""

import io
import json
import pickle
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cluster.data.manifest import Manifest
from cluster.storage import Folder
from nn_models.errors import UserError

if TYPE_CHECKING:
    from cluster.recipe.recipe import Recipe

State = dict[str, Any]


def name_at(step: int) -> str:
    """The file of a step's checkpoint."""
    return f"step-{step:010d}.pt"


class Checkpoints:
    """RUN/checkpoints: one file a checkpoint, the newest `keep` of them."""

    def __init__(self, folder: Folder, *, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, step: int, state: State) -> str:
        """Write the state at `step`, then drop the oldest files. Returns the file's name."""
        name = name_at(step)
        self.save_as(name, state)
        self.drop_oldest()
        return name

    def drop_oldest(self) -> None:
        """Delete all but the newest `keep`."""
        for old in self.names()[: -self._keep]:
            self.folder.delete(old)

    def save_as(self, name: str, state: State) -> None:
        """Write a state under a name of its own; it is kept."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.folder.write_bytes(name, buffer.getbuffer())

    def names(self) -> list[str]:
        """The checkpoints' files, oldest first."""
        return [name for name in self.folder.names() if name.startswith("step-") and name.endswith(".pt")]

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        names = self.names()
        return int(names[-1].removeprefix("step-").removesuffix(".pt")) if names else None

    def newest(self) -> State | None:
        """The newest state, on the CPU; None where there is none. Raises UserError for a bad or unreadable file."""
        step = self.newest_step()
        return None if step is None else self.at(step)

    def at(self, step: int) -> State:
        """The state at `step`, on the CPU. Raises UserError where there is none, and for a bad or unreadable file."""
        name = name_at(step)
        older = [other for other in self.names() if other < name]
        before = f"the one before, {older[-1]}" if older else "the beginning"
        try:
            return self.read(name, fix=f"delete it to resume from {before}")
        except FileNotFoundError:
            raise UserError(
                f"{self.folder}/{name}",
                "no such checkpoint here",
                "on several nodes --run must be a URI, or a directory that all nodes share",
            ) from None

    def read(self, name: str, *, fix: str = "restore it, or start a new run") -> State:
        """The state in a file, on the CPU. Raises UserError where it is damaged."""
        content = self.folder.read_bytes(name)
        try:
            return _read_state(content)
        except Exception as error:  # torch raises RuntimeError, EOFError, … for damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.folder}/{name}", f"damaged checkpoint ({reason})", fix) from None

    def refuse_other(self, state: State, *, recipe: "Recipe", rows: str) -> None:
        """Raise UserError for a state of another model, or of other data (`rows` as `described_rows` says)."""
        if json.loads(state["recipe"])["model"] != json.loads(recipe.model_dump_json())["model"]:
            raise UserError(str(self.folder), "checkpoints of another model", "choose another --run")
        if state["rows"] != rows:
            raise UserError(
                str(self.folder),
                f"the data has changed since this run began, from {state['rows']} to {rows}",
                "start a new run with another --run",
            )


def described_rows(manifest: Manifest) -> str:
    """What places in the order of rows, and a model's inputs and outputs, refer to."""
    signature = manifest.signature
    row = signature["input"].extent
    if "target" in signature and signature["target"].predicted:
        row += f" with {signature.num_outputs}{' standardised' * bool(manifest.columns['target'].mean)} outputs"
    return f"{manifest.rows('train')} rows of {row}"


def _read_state(content: bytes) -> State:
    """What `torch.save` has written, its checksums compared (torch writes them, and ignores them)."""
    if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():
        raise ValueError(f"the checksum of {damaged} differs")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises to run it
        raise ValueError("it holds other things than tensors and numbers") from None
    if not isinstance(state, dict) or "progress" not in state:
        raise ValueError("it holds something else")
    return state


class Background:
    """Runs jobs one after the other beside the loop; a job's exception is raised at a later call."""

    MOST_WAITING = 4  # each holds a copy of the weights, or of all state

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._jobs: deque[Future[Any]] = deque()

    def submit(self, job: Callable[[], Any]) -> None:
        """Queue this job; waits only where too many are queued already."""
        while self._jobs and (self._jobs[0].done() or len(self._jobs) >= self.MOST_WAITING):
            self._jobs.popleft().result()
        self._jobs.append(self._thread.submit(job))

    def wait(self) -> None:
        """Return once nothing is being written."""
        while self._jobs:
            self._jobs.popleft().result()

    def close(self) -> None:
        """Wait and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=True)


def to_cpu(state: Any) -> Any:
    """A copy of a state dict that later steps cannot change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_cpu(value) for value in state)
    return state


class SavedModel(NamedTuple):
    """What RUN/model/model.safetensors holds."""

    weights: dict[str, Tensor]
    best: dict[str, Any]  # metric, value, epoch, step
    manifest: Manifest  # of the training data: signature, normalisation, class names (without its shards)


def save_model(run: Folder, weights: dict[str, Tensor], *, best: dict[str, Any], manifest: Manifest) -> None:
    """Write the best weights; everything needed to use them stands in the same file."""
    described = manifest.model_copy(update={"splits": {}}).model_dump_json()
    metadata = {"best": json.dumps(best), "data": described}
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}  # safetensors keeps no strides
    (run / "model").write_bytes("model.safetensors", save(contiguous, metadata))


def read_model(run: Folder) -> SavedModel:
    """The best weights of a run. Raises UserError where there are none or the file is damaged."""
    folder = run / "model"
    path = f"{folder}/model.safetensors"
    try:
        content = folder.read_bytes("model.safetensors")
    except FileNotFoundError:
        raise UserError(path, "no model here", "give the directory of a run that has finished an epoch") from None
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        manifest = Manifest.model_validate_json(header["data"])
        return SavedModel(load(content), json.loads(header["best"]), manifest)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(path, f"damaged ({error})", "train again or restore the file") from None


def restore_model(run: Folder, recipe: "Recipe") -> tuple[nn.Module, SavedModel]:
    """The run's best model in evaluation mode, on the CPU. Raises UserError where the weights do not fit."""
    saved = read_model(run)
    model = recipe.model.build(saved.manifest.signature)
    try:
        model.load_state_dict(saved.weights)
    except RuntimeError as error:
        raise UserError(
            f"{run}/model/model.safetensors", f"not the weights of {run}/model/recipe.yaml ({error})"
        ) from None
    return model.eval(), saved
