"""A process group of workers one of whom dies while they meet, the first time."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train.backend import Backend

from cluster.training.ray_train import NodesConfig, _NodesBackend


@dataclass
class DyingConfig(NodesConfig):
    """The last worker kills itself before it has met the others, unless the file `died` is there already."""

    died: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        return _DyingBackend


class _DyingBackend(_NodesBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if not Path(backend_config.died).exists():
            Path(backend_config.died).touch()
            worker_group.execute_single_async(len(worker_group) - 1, _die)
        super().on_start(worker_group, backend_config)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
