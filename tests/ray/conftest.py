"""Ray for the tests: started once a session; one recipe that every number of workers must agree on."""

from typing import Any

import pytest

from cluster.runtime import configure_ray

# digits in small steps; nothing in it depends on a rank's own random stream
EXACT: dict[str, Any] = {
    "name": "exact",
    "model": {"kind": "mlp", "hidden": [32], "activation": "tanh"},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "schedule": {"kind": "cosine", "warmup_steps": 5},
    "train": {"epochs": 3, "global_batch_size": 100, "log_every_steps": 1, "cpus_per_worker": 1},
}


@pytest.fixture(scope="session")
def ray():
    """A Ray of eight logical CPUs, as a user's notebook might have started it."""
    configure_ray()
    import ray as module

    module.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield module
    module.shutdown()
