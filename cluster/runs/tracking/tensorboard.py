"""TensorBoard: beside the curves that every run has in RUN/events, its parameters and figures as the HParams tab."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.runs.tracking.tracker import Begun, Ended, Tracker
from cluster.storage import Folder

EVENTS = "events"  # of a run's directory


class TensorBoard(Tracker):
    """An event file more in the run's directory, once the run has ended. TensorBoard holds no files: it names them."""

    name = "tensorboard"

    def begin(self, begun: Begun) -> str:
        """See Tracker."""
        self._begun = begun
        return EVENTS

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker. The run's own event file has them."""

    def end(self, ended: Ended) -> None:
        """See Tracker."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import hparams, text

        recipe = ended.files["recipe.yaml"].read_text() if "recipe.yaml" in ended.files else ""
        files = "\n".join(f"- {self._begun.where}/{name}" for name in ended.files)
        told = {
            "recipe": f"```yaml\n{recipe}```",
            "files": files,
            "status": ended.status,
        }
        summaries = [*hparams(dict(self._begun.parameters), dict(ended.metrics))]
        summaries += [text(tag, words) for tag, words in told.items()]
        with tempfile.TemporaryDirectory(prefix="manta-") as folder:
            # of one name, so that a run that goes on says it once
            writer = EventsWriter(str(Path(folder, "events")), ".hparams")
            for summary in summaries:
                writer.write_event(Event(summary=summary))
            writer.close()
            (written,) = Path(folder).iterdir()
            events = Folder(self._begun.where) / EVENTS
            for name in events.names():
                if name.endswith(".hparams"):
                    events.delete(name)
            events.write_bytes(written.name, written.read_bytes())

    @property
    def where(self) -> str:
        """See Tracker."""
        return f"tensorboard --logdir {self._begun.where}"
