"""Starting: a group of Ray Train's workers comes up, or leaves its room to the next one, which waits until it has it.

With Ray 2.60's own a worker that dies while the group meets leaves a placement group behind that nobody removes. Where
the cluster has no room for two groups, each try after it waits in vain for 60 s, and the run ends as failed.
"""

import time

from ray.exceptions import RayActorError
from ray.train import FailureConfig, TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution import controller
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from cluster.training.notes import WAITED, Notes

PATIENCE_S = 1800.0  # for room: an autoscaler's node may have to boot and to install all


class Group(WorkerGroup):
    """Takes away all that it has where it does not come up."""

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if self.has_started():  # else Ray's own does it
                self._worker_group_state.shutdown()
                self._clear_state()
            if isinstance(error, RayActorError):  # just before the training began; to Ray's own this is a fault
                raise WorkerGroupStartupFailedError("one of the workers died while they started") from error
            raise


class TrainController(controller.TrainController):
    """Ray Train's, by its name too, with groups that leave nothing behind."""

    worker_group_cls = Group


class Patient(DefaultFailurePolicy):
    """Waits for room without counting it as a failure, and notes how many seconds it has waited.

    Ray tries anew every RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, with as many workers as there is room for then.
    """

    def __init__(self, config: FailureConfig, notes: str) -> None:
        """The notes with this key are the driver's."""
        super().__init__(config)
        self._notes = notes
        self._since: float | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """See FailurePolicy."""
        cause = getattr(training_failed_error, "controller_failure", None)
        if not isinstance(cause, WorkerGroupStartupTimeoutError):
            self._since = None
            return super().make_decision(training_failed_error)
        now = time.monotonic()
        self._since = self._since or now
        Notes(self._notes).write(WAITED, now - self._since)
        return FailureDecision.RETRY if now - self._since < PATIENCE_S else FailureDecision.RAISE
