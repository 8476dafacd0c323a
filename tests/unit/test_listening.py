"""What a sweep's driver raises while Ray Tune calls it: kept for the end of Tune's step, not told by Tune."""

from types import SimpleNamespace

import pytest

from cluster.errors import RayLost, StorageFailed
from cluster.tuning.messages import CONFIG
from cluster.tuning.tune import Listening


def failing(*_):
    raise StorageFailed("trials/0000/trial.json: cannot be written")


def listening(**what) -> Listening:
    told = dict.fromkeys(("on_start", "on_epoch", "on_end", "look"), lambda *_: None)
    return Listening(**{**told, **what})


def trial() -> SimpleNamespace:
    config = SimpleNamespace(index=0, indices=[0])
    return SimpleNamespace(config={CONFIG: config}, num_failures=0, last_result={}, error_file=None)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("on_start", lambda told: told.on_trial_start(0, [], trial())),
        ("on_epoch", lambda told: told.on_trial_result(0, [], trial(), {})),
        ("on_end", lambda told: told.on_trial_complete(0, [], trial())),
        ("on_end", lambda told: told.on_trial_error(0, [], trial())),
    ],
)
def test_a_failing_storage_ends_the_sweep_after_the_step(name, call):
    told = listening(**{name: failing})
    call(told)
    with pytest.raises(StorageFailed, match=r"trial\.json: cannot be written"):
        told.on_step_end(0, [])


def test_who_is_asked_for_trials_has_no_more_once_the_storage_fails():
    told = listening()
    assert told.asked(failing)() is None
    with pytest.raises(StorageFailed):
        told.on_step_end(0, [])


def test_a_ray_that_has_gone_ends_the_sweep():
    def gone():
        raise RayLost("Ray's GCS has died")

    with pytest.raises(RayLost):
        listening(look=gone).on_step_end(0, [])
    listening().on_step_end(0, [])
