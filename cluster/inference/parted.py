"""Parted: a prediction on Ray workers: parts of the rows by a pool of actors that hold the model (Ray Data).

What is done is kept beside the file that is to be written, so that a prediction that was cut short goes on. Parts are
joined in their order at the end; never more than a few of them are in memory.
"""

import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from cluster.errors import RunFailed
from cluster.inference.predictions import Predicting, Prediction
from cluster.inference.unfinished import UnfinishedPrediction, packed_counts, written
from cluster.runs.admission import workers_of
from cluster.runs.going_on import last_word
from cluster.runtime import Workers, local_device, ray_session, refuse_unplaceable, warn_about_cores
from cluster.runtime.existing import existing, first_line
from cluster.storage import Folder
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

TOLD_S = 10.0  # between two words about how far it is
GO_ON = "the same command goes on from there"


class PartedPrediction:
    """A prediction whose parts are computed by workers, each of them once, and kept in a folder until all are done."""

    def __init__(self, prediction: Prediction, folder: Folder, *, overwrite: bool = False) -> None:
        """Raises UserError where the rows come only once, or the folder holds another prediction."""
        if prediction.streamed:
            raise UserError(
                "--workers", "standard input is read once, and by one process", "leave it out, or give a file"
            )
        self.prediction, self.unfinished = prediction, UnfinishedPrediction(folder)
        self._parts = prediction.rows.parts
        self.done = self.unfinished.begin(prediction.described, overwrite=overwrite)

    def compute(
        self,
        num_workers: int | tuple[int, int],
        *,
        use_gpu: bool = False,
        address: str | None = None,
        verbose: bool = False,
    ) -> None:
        """Have workers predict the parts that are not there yet, and keep each as soon as it is done.

        Raises UserError for rows that cannot be used, and RunFailed where workers cannot go on.
        """
        missing = [number for number in range(len(self._parts)) if number not in self.done]
        if self.done:
            logger.info("%d of %d parts are there already", len(self.done), len(self._parts))
        if not missing:
            return
        there = existing(address, wanted=True)
        workers = workers_of(self.prediction.model.recipe, num_workers, use_gpu, alone=there is None)
        most = min(workers.most, len(missing))  # others would have nothing to do
        workers = replace(workers, least=min(workers.least, most), most=most)
        with (
            self.unfinished.folder.claimed(),
            ray_session(address=there, cpus=workers.most * workers.cpus, verbose=verbose) as session,
        ):
            if session.embedded:
                warn_about_cores(workers)
            refuse_unplaceable(session.ray, workers)
            with last_word(session, lambda reason: f"{reason}; {GO_ON}"):
                self._compute(session.ray, workers, missing, verbose=verbose)

    def _compute(self, ray: Any, workers: Workers, missing: Sequence[int], *, verbose: bool) -> None:
        told = time.monotonic()
        for result in _results(ray, self.prediction.predicting, workers, missing, verbose=verbose):
            if error := result["error"]:
                raise pickle.loads(error)
            self.unfinished.keep(result["number"], result["table"], result["counted"])
            self.done.add(result["number"])
            if time.monotonic() - told > TOLD_S:
                told = time.monotonic()
                logger.info("%d of %d parts", len(self.done), len(self._parts))

    def tables(self) -> Iterator[pa.Table]:
        """The rows of all parts, in their order; the prediction's figures are known once they are through."""
        for number in range(len(self._parts)):
            found = self.unfinished.found(number)
            self.prediction.tally.add(found.counted)
            yield found.table

    def delete(self) -> None:
        """The parts, once their rows are in the file."""
        self.unfinished.delete()


@contextmanager
def _core_silent(verbose: bool) -> Iterator[None]:
    """What Ray's core writes to standard error in the block is in Ray's files alone; what Python writes is shown.

    It says of each pool of actors, where it is made, that they may be started again, which is as it should be.
    """
    if verbose:
        yield
        return
    shown, kept, nowhere = sys.stderr, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with os.fdopen(kept, "w", buffering=1, closefd=False) as own:
            sys.stderr = own if shown is sys.__stderr__ else shown
            yield
    finally:
        sys.stderr = shown
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _results(
    ray: Any, predicting: Predicting, workers: Workers, numbers: Sequence[int], *, verbose: bool
) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if not verbose:  # its import has set a level of its own
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    least, most = workers.least, workers.most
    pool = {"size": most} if least == most else {"min_size": least, "max_size": most}
    # a block a part: what one actor is given at once
    dataset = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    predicted = dataset.map(
        PartPredictor,
        fn_constructor_kwargs={
            "path": sys.path,
            "predicting": ray.put(ray.cloudpickle.dumps(predicting)),
            "threads": workers.cpus,
            "use_gpu": workers.use_gpu,
        },
        compute=ray.data.ActorPoolStrategy(**pool),
        num_cpus=workers.cpus,
        num_gpus=int(workers.use_gpu),
    )
    try:
        rows = iter(predicted.iter_rows())
        with _core_silent(verbose):
            first = next(rows)
        yield first
        yield from rows
    except ray.exceptions.RayError as error:
        raise RunFailed(f"workers could not go on ({first_line(error)}); {GO_ON}") from None


class PartPredictor:
    """A worker's model, which it is given once; called, it predicts one part."""

    def __init__(self, path: Sequence[str], predicting: Any, threads: int, use_gpu: bool) -> None:
        """`predicting` is where a pickled Predicting lies, whose modules are found as where it comes from."""
        import ray
        import torch

        sys.path.extend(part for part in path if part not in sys.path)
        torch.set_num_threads(threads)
        self._predicting: Predicting = pickle.loads(ray.get(predicting))
        self._predicting.model.to(local_device(use_gpu))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The part's rows and counts as the content of files, or what a user must mend."""
        number = int(row["number"])
        found = {"number": number, "table": b"", "counted": b"", "error": b""}
        try:
            predicted = [*self._predicting.found(self._predicting.rows.parts[number])]
        except UserError as error:  # of an exception Ray Data lets out no more than its text
            return {**found, "error": pickle.dumps(error)}
        counted = [one for piece in predicted for one in piece.counted]
        table = pa.concat_tables([piece.table for piece in predicted])
        return {**found, "table": written(table), "counted": packed_counts(counted)}
