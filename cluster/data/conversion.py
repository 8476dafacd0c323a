"""Conversion of large sources with Ray Data: parts are turned into shards by many processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cluster.data.prepare import Converted, Mapper, Slot
from cluster.errors import RunFailed
from nn_models.errors import UserError


def ray_mapper(ray: Any) -> Mapper:
    """A mapper for `prepare` that runs on the Ray that this process is connected to."""

    def mapper(function: Callable[[Slot], Converted], slots: Sequence[Slot]) -> Iterable[Converted]:
        rows = [{"index": index, "slot": slot} for index, slot in enumerate(slots)]
        # one block a part: a part is as much as one process should hold
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        converted = dataset.map(_Convert(function))
        try:
            results = sorted(converted.take_all(), key=lambda row: row["index"])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            while cause is not None and not isinstance(cause, (UserError, RunFailed)):
                cause = cause.__cause__ or getattr(cause, "cause", None)
            raise cause or error from None
        for row in results:
            if isinstance(row["converted"], UserError):
                raise row["converted"]
        return [row["converted"] for row in results]

    return mapper


class _Convert:
    """The map function; a class because Ray Data names a step after it."""

    def __init__(self, function: Callable[[Slot], Converted]) -> None:
        self._function = function
        self.__name__ = "convert"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        converted: Converted | UserError
        try:
            converted = self._function(row["slot"])
        except UserError as error:  # handed back as a result: of an exception Ray Data lets out no more than its text
            converted = error
        return {"index": row["index"], "converted": converted}
