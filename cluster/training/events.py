"""Events: a run's metrics as TensorBoard reads them."""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path

FLUSH_S = 10


class Events:
    """An event file, written record by record through tensorboardX.

    Its SummaryWriter has two threads and a queue between processes, which for each of many small trials cost more than
    the training that they tell of.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        """A new file in `folder`; what earlier ones say of steps from `purge_step` on is no longer shown."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # files are named by the second: a run that goes on at once would else overwrite what it wrote before
        self._writer = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._flush_at = 0.0

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add values of one step, each by its tag."""
        now = time.time()
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.write_event(self._event(step=step, wall_time=now, summary=self._summary(value=values)))
        if now >= self._flush_at:
            self._writer.flush()
            self._flush_at = now + FLUSH_S

    def flush(self) -> None:
        """Make all that was added readable."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
