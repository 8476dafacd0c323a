"""Journal: what a run remembers and tells of itself: one for the loop, a fused trial and a GAN's coordinator."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.data.keys import digest_part, digest_text
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from cluster.training.progress import Progress, means
from cluster.training.run_directory import Recorder, RunDirectory
from nn_models.batch import Place
from nn_models.metrics import Better


@dataclass(frozen=True)
class Result:
    """What result.json says of a run that has come to its end, beside its times."""

    metrics: dict[str, float]  # of the weights that are kept, named as `test/accuracy`
    best: dict[str, Any]  # these weights: see progress.lifted
    last: dict[str, Any]  # the last epoch, its step and its metrics
    checkpoint: str | None
    steps: int
    epochs: int
    ended: str | None  # why before the last epoch
    rows_per_s: float | None
    num_parameters: int
    world_size: int
    first_step_at: float | None  # the time, as time.time() has it
    restarts: int = 0  # of the workers, after one has died
    preemptions: int = 0  # moves of the workers, after a warning
    lost_s: float = 0.0  # from the checkpoints gone on from to the steps that followed, over both
    more: dict[str, Any] = field(default_factory=dict)  # a GAN's untrained figures and rollbacks

    def facts(self) -> dict[str, Any]:
        """As plain values, by name."""
        known = asdict(self)
        more = known.pop("more")
        return {**known, "stopped_early": self.ended is not None, **more}


class Journal:
    """Keeps progress, writes lines of metrics, knows the best. `names` are the metrics whose sums are added up.

    Only who `writes` has files: rank 0, or the one process that there is.
    """

    def __init__(self, run: Folder, names: Sequence[str], *, writes: bool = True) -> None:
        self.run, self.names = run, tuple(names)
        self.progress = Progress(sums=[0.0] * len(self.names))
        self.first_step_at: float | None = None
        self._writes = writes
        self._recorder: Recorder | None = None
        self._began = time.time()
        self._broken_at: float | None = None  # until the first step after a break

    def open(self, *, began: float, keep_to_step: int | None = None, since: float | None = None) -> None:
        """Start to write; lines of steps past the progress (or `keep_to_step`), from before a restart, are dropped.

        `began` is when this process took the run up. Times are told as if it had run without a break; what the break
        has cost counts as lost where this is not the first start of a run that goes on `since` then.
        """
        self.close()
        if since is None or self.progress.saved_at < since:
            self.progress.lost_s = 0.0
        elif self.first_step_at is None:
            self.first_step_at = self.progress.first_step_at
        self._broken_at = None if since is None else max(self.progress.saved_at, since)
        if self._writes:
            step = self.progress.step if keep_to_step is None else keep_to_step
            self._recorder = Recorder(RunDirectory(self.run), keep_to_step=step)
        self._began = began - self.progress.time_s

    @property
    def time_s(self) -> float:
        """How long the run has taken so far, without its breaks."""
        return time.time() - self._began

    def log(self, split: str, metrics: Mapping[str, float], **extra: Any) -> None:
        """Write one line of metrics."""
        if self._recorder:
            place = {"step": self.progress.step, "epoch": self.progress.epoch, "split": split}
            self._recorder.append({**place, **metrics, **extra, "time_s": round(self.time_s, 3)})

    # -- steps -----------------------------------------------------------------------------------------------------

    def stepped(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self.progress.step += steps
        self.progress.epoch_step += steps
        self.first_step(at=time.time())

    def first_step(self, *, at: float) -> None:
        """Note when the first step since `open` was done, where it is the first."""
        if self.first_step_at is None:
            self.first_step_at = at
        if self._broken_at is not None:
            self.progress.lost_s += max(0.0, at - self._broken_at)  # by the clocks of two nodes
            self._broken_at = None

    def interval(
        self,
        sums: list[float],
        *,
        weight: float,
        counts: list[float] | None = None,
        rows_per_s: float,
        **extra: Any,
    ) -> None:
        """Take in the steps since the last line, sums over all ranks, and write a line with their means."""
        self.progress.add(sums, weight=weight, counts=counts)
        metrics = dict(zip(self.names, means(sums, weight, counts), strict=True))
        self.log("train", metrics, rows_per_s=rows_per_s, **extra)

    def trained(self, *, rows: int, seconds: float, digest: Sequence[int]) -> None:
        """Take in how many rows were trained in how long, and their part of the digest."""
        progress = self.progress
        progress.train_rows += rows
        progress.train_s += seconds
        progress.digest = [old + int(new) for old, new in zip(progress.digest, digest, strict=True)]

    def epoch_trained(self) -> dict[str, float]:
        """The epoch's metrics over all its rows, and a line that says so."""
        progress = self.progress
        progress.train = dict(zip(self.names, progress.means(), strict=True))
        self.log("train", progress.train, rows_digest=digest_text(progress.digest), end_of_epoch=True)
        return progress.train

    def validated(self, metrics: Mapping[str, float], **extra: Any) -> None:
        """Metrics of the validation split, and a line with them."""
        self.progress.validation = dict(metrics)
        self.log("validation", metrics, **extra)

    # -- the best, and the end -------------------------------------------------------------------------------------

    def note_best(self, metric: str, better: Better, **about: Any) -> bool:
        """Whether the epoch that has just been evaluated is the best so far, by this metric.

        `about` is what else there is to say of the weights that are then kept.
        """
        progress = self.progress
        split, metrics = ("validation", progress.validation) if progress.validation else ("train", progress.train)
        found = {
            "metric": f"{split}/{metric}",
            "value": metrics[metric],
            "loss": metrics["loss"],
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "metrics": self.metrics(),
            **about,
        }
        return progress.take_best(found, better)

    def metrics(self) -> dict[str, float]:
        """Those of the last epoch, named as `validation/loss`."""
        return prefixed("train", self.progress.train) | prefixed("validation", self.progress.validation)

    def result(
        self,
        *,
        tested: Mapping[str, float] | None,
        checkpoints: Checkpoints,
        num_parameters: int,
        world_size: int = 1,
        restarts: int = 0,
        preemptions: int = 0,
        ended: str | None = None,
        **more: Any,
    ) -> Result:
        """What result.json shall say; writes the line of the test split, where it was evaluated."""
        progress = self.progress
        if tested is not None:
            self.log("test", tested)
        names = checkpoints.names()
        best = dict(progress.best or {})
        return Result(
            metrics=best.get("metrics", {}) | prefixed("test", tested or {}),
            best=best,
            last={"epoch": progress.epoch, "step": progress.step, "metrics": self.metrics()},
            checkpoint=f"checkpoints/{names[-1]}" if names else None,
            steps=progress.step,
            epochs=progress.epoch,
            ended=ended or progress.ended,
            rows_per_s=progress.train_rows / progress.train_s if progress.train_s else None,
            num_parameters=num_parameters,
            world_size=world_size,
            first_step_at=self.first_step_at,
            restarts=restarts,
            preemptions=preemptions,
            lost_s=round(progress.lost_s, 3),
            more=more,
        )

    def state(self) -> dict[str, Any]:
        """The progress as a checkpoint has it."""
        self.progress.time_s, self.progress.saved_at = self.time_s, time.time()
        self.progress.first_step_at = self.first_step_at
        return self.progress.state()

    def flush(self) -> None:
        """Make what was written visible in the run's directory."""
        if self._recorder:
            self._recorder.flush()

    def close(self) -> None:
        """Write out everything and close the files."""
        recorder, self._recorder = self._recorder, None
        if recorder:
            recorder.close()


class Pending:
    """Losses and metric sums of at most `num_steps` steps, kept on the device, in memory that is taken once.

    A step waits for nothing, and allocates nothing that outlives it: small tensors kept from every step lie between the
    places of the large ones, so that these were taken anew from the system again and again (a CNN lost a tenth of its
    speed on a CPU).
    """

    def __init__(self, num_steps: int, num_metrics: int, device: torch.device) -> None:
        self._num_steps, self._size = num_steps, 1 + num_metrics
        # the loss, each metric, and what each of these counts where that is not what the loss counts
        self._sums = torch.zeros(num_steps, 2 * self._size, dtype=torch.float64, device=device)
        self._losses = self._sums[:, 0].unbind()  # views, one a step
        self._metrics = self._sums[:, 1 : self._size].unbind()
        self._counts = self._sums[:, self._size + 1 :].unbind()
        self._counted = False
        self._used: list[Sequence[Place]] = []  # the pieces of each step's batch
        self.grad_norm: Tensor | None = None
        self.earlier: Collected | None = None  # of the same interval, from before a break

    @property
    def full(self) -> bool:
        """Whether the interval is over: the next step would find no room."""
        return len(self._used) + (len(self.earlier.sums) if self.earlier else 0) >= self._num_steps

    def begin(self, places: Sequence[Place]) -> None:
        """Note the rows of a new step, which comes in these pieces."""
        self._used.append(places)

    def add(self, loss: Tensor, metrics: Tensor, counts: Tensor | None = None) -> None:
        """The summed loss () and metric sums (metrics,) of one piece of the step's batch, and the metrics' counts."""
        step = len(self._used) - 1
        self._losses[step].add_(loss)
        self._metrics[step].add_(metrics)
        if counts is not None:
            self._counted = True
            self._counts[step].add_(counts)

    def collect(self) -> "Collected":
        """What has been added up; starts anew."""
        sums = self._sums[: len(self._used)].clone()
        self._sums.zero_()
        parts = [np.zeros(2, np.int64)]
        parts += [digest_part(place.ids, place.start) for places in self._used for place in places]
        collected = Collected(
            sums=sums if self._counted else sums[:, : self._size],
            size=self._size,
            digest=np.sum(parts, axis=0),
            rows=sum(places[0].global_rows for places in self._used),
            weight=sum(places[0].global_weight for places in self._used),
        )
        self._used = []
        return collected


@dataclass(frozen=True)
class Collected:
    """Some steps of one rank, or of all: `sums` (steps, size), or (steps, 2 * size) where metrics have own counts."""

    sums: Tensor
    size: int
    digest: NDArray[np.int64]
    rows: int  # of all ranks
    weight: float  # of all ranks: what the loss counts
    seconds: float = 0.0

    def after(self, earlier: "Collected | None") -> "Collected":
        """These steps together with earlier ones."""
        if earlier is None or not len(earlier.sums):
            return self
        if not len(self.sums):
            return earlier
        return Collected(
            sums=torch.cat([earlier.sums, self.sums]),
            size=self.size,
            digest=earlier.digest + self.digest,
            rows=earlier.rows + self.rows,
            weight=earlier.weight + self.weight,
            seconds=earlier.seconds + self.seconds,
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        plain = {"digest": self.digest.tolist(), "rows": int(self.rows), "weight": float(self.weight)}
        return {**vars(self), **plain, "sums": self.sums.cpu()}

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> "Collected":
        """From a checkpoint."""
        return cls(**{**state, "sums": state["sums"].to(device), "digest": np.array(state["digest"], np.int64)})


def prefixed(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as result.json names them: `test/accuracy`."""
    return {f"{split}/{name}": value for name, value in metrics.items()}
