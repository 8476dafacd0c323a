"""MLflow: a run of the experiment $MLFLOW_EXPERIMENT_NAME, or `manta`, where $MLFLOW_TRACKING_URI says."""

import os
import time
from collections.abc import Mapping
from typing import Any

from cluster.runs.tracking.tracker import Begun, Ended, Tracker

EXPERIMENT = "manta"
MOST_AT_ONCE = 100  # parameters that a server takes in one request
LONGEST = 500  # characters of a parameter that every version takes
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

# Said before it is imported, where the user has said nothing: it sends no statistics of its use, tells of what it does
# to a database only where that fails, and gives up on a server that does not answer in bearable time.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class MLflow(Tracker):
    """Through MLflow's client, which knows no current run, so that the user's own are left alone."""

    name = "mlflow"
    needs = ("mlflow", "sqlalchemy")

    def begin(self, begun: Begun) -> str:
        """See Tracker. A run that is continued goes on where it is still known."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient()
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        self._uri = mlflow.get_tracking_uri()
        if begun.known is not None and self._knows(begun.known):
            self._run = begun.known
            self._client.update_run(self._run, status="RUNNING")
            return self._run
        tags = {"mlflow.source.name": "manta", "manta.run": begun.where}
        created = self._client.create_run(self._experiment_id(), run_name=begun.name, tags=tags)
        self._run = str(created.info.run_id)
        parameters = [Param(name, str(value)[:LONGEST]) for name, value in begun.parameters.items()]
        for first in range(0, len(parameters), MOST_AT_ONCE):
            self._client.log_batch(self._run, params=parameters[first : first + MOST_AT_ONCE])
        return self._run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def end(self, ended: Ended) -> None:
        """See Tracker."""
        for name, path in ended.files.items():
            self._client.log_artifact(self._run, str(path), name.rpartition("/")[0] or None)
        for name, value in ended.metrics.items():
            self._client.log_metric(self._run, f"kept/{name}", value)
        self._client.set_terminated(self._run, STATUS[ended.status])

    @property
    def where(self) -> str:
        """See Tracker."""
        return f"run {self._run} of experiment {self._experiment} in {self._uri}"

    def _knows(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(run)
        except MlflowException:
            return False
        return True

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found: Any = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment))
            except MlflowException:  # another run was quicker
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        return str(found.experiment_id)
