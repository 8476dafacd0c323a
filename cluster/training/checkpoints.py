"""Checkpoints of a run and its best weights: written whole by a background thread, read without running code."""

import io
import json
import pickle
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cluster.data.manifest import Manifest
from cluster.errors import RunFailed
from cluster.runtime.limits import refusing_impossible_models
from cluster.storage import Folder
from cluster.training.identity import other_data
from cluster.training.progress import Best, lifted
from nn_models.errors import UserError
from nn_models.spec import validate

if TYPE_CHECKING:
    from cluster.recipe.recipe import Recipe

State = dict[str, Any]
WEIGHTS = "model.safetensors"  # in RUN/model


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

    @contextmanager
    def restoring(self, name: str) -> Iterator[None]:
        """Tell what goes wrong in the block, which takes up the state of a file, as a problem of that file.

        It may be of another version of manta, whose fields are others. Raises UserError.
        """
        try:
            yield
        except UserError as error:
            if error.path.startswith(str(self.folder)):
                raise
            raise self._unfit(name, f"{error.path}: {error.message}") from None
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, RunFailed) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
            raise self._unfit(name, what) from None

    def _unfit(self, name: str, what: str) -> UserError:
        return UserError(
            f"{self.folder}/{name}",
            f"not a checkpoint that this version of manta can go on from ({what})",
            "use the version that has written it, or delete it",
        )

    def refuse_other(self, state: State, *, recipe: "Recipe", manifest: Manifest) -> None:
        """Raise UserError for a state of another model, or of other data than the manifest's."""
        # a model's section as this version reads it: fields that are newer than the checkpoint are at their defaults
        model: Any = validate(type(recipe.model), json.loads(state["recipe"])["model"])
        if model != recipe.model:
            raise UserError(str(self.folder), "checkpoints of another model", "choose another --run")
        if differs := other_data(state.get("data") or {"rows": state["rows"]}, manifest):
            raise changed_data(str(self.folder), differs)


def one_line(error: BaseException) -> str:
    """What an error says, on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:300]} …" if len(text) > 300 else text


def changed_data(path: str, differs: str) -> UserError:
    """The error for data that has changed since a run began: how, as `other_data` says."""
    return UserError(
        path,
        f"the data has changed since this run began, {differs}",
        "give it the data that it began with, or start a new run with another --run",
    )


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
    best: dict[str, Any]  # metric, value, epoch, step, metrics: see progress.lifted
    manifest: Manifest  # of the training data: signature, normalisation, class names (without its shards)


def save_model(run: Folder, weights: dict[str, Tensor], *, best: dict[str, Any], manifest: Manifest) -> None:
    """Write the best weights; everything needed to use them stands in the same file."""
    described = manifest.model_copy(update={"splits": {}}).model_dump_json()
    metadata = {"best": json.dumps(best), "data": described}
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}  # safetensors keeps no strides
    (run / "model").write_bytes(WEIGHTS, packed(contiguous, metadata))


def packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content.

    The library itself writes the metadata in an order that differs from call to call.
    """
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    ordered = {**header, "__metadata__": dict(sorted(header["__metadata__"].items()))}
    text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the library does, so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text + content[start:]


def read_model(run: Folder) -> SavedModel:
    """The best weights of a run. Raises UserError where there are none or the file is damaged."""
    folder = run / "model"
    path = f"{folder}/{WEIGHTS}"
    try:
        content = folder.read_bytes(WEIGHTS)
    except FileNotFoundError:
        raise UserError(path, "no model here", "give the directory of a run that has finished an epoch") from None
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        manifest: Manifest = validate(Manifest, json.loads(header["data"]))
        best: dict[str, Any] = json.loads(header["best"])
        validate(Best, best)
        return SavedModel(load(content), lifted(best), manifest)
    except (SafetensorError, UserError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(path, f"damaged ({one_line(error)})", "train again or restore the file") from None


def _refuse_misfits(recipe: "Recipe", saved: SavedModel) -> None:
    """Raise ValueError where the recipe's model has other weights, before it takes memory."""
    try:
        with torch.device("meta"):
            wanted = recipe.model.build(saved.manifest.signature).state_dict()
    except UserError:
        raise
    except Exception:  # a custom model need not be able to do without memory
        return
    for name in {**wanted, **saved.weights}:
        here, there = (tuple(found[name].shape) if name in found else None for found in (saved.weights, wanted))
        if here != there:
            raise ValueError(f"{name} is {here or 'missing'} there, and {there or 'missing'} in the recipe's model")


def read_best(run: Folder) -> dict[str, Any] | None:
    """What is known of the weights that a run keeps, from the head of their file; None where that cannot be read."""
    folder = run / "model"
    try:
        with folder.filesystem.open_input_file(folder.full("model.safetensors")) as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(min(length, file.size()))  # a damaged file may say any length
        return lifted(json.loads(json.loads(head)["__metadata__"]["best"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def restore_model(run: Folder, recipe: "Recipe") -> tuple[nn.Module, SavedModel]:
    """The run's best model in evaluation mode, on the CPU. Raises UserError where the weights do not fit."""
    saved = read_model(run)
    try:
        with refusing_impossible_models():
            _refuse_misfits(recipe, saved)
            model = recipe.model.build(saved.manifest.signature)
        model.load_state_dict(saved.weights)
    except (UserError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{run}/model/{WEIGHTS}",
            f"not the weights of {run}/model/recipe.yaml ({one_line(error)})",
            "restore both from one run",
        ) from None
    return model.eval(), saved
