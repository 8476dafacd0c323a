"""Start-up on Ray: wall time of one epoch of digits-mlp on two workers against a bare TorchTrainer doing the same.

`other_with_our_settings` is the bare trainer's time with the environment variables that manta gives Ray.
"""

import statistics

from measuring import BY_HAND, Case, fresh_process, in_turn, options, publish, scratch

from cluster.runtime import SETTINGS

ARGUMENTS = ("-m", "jobs", "train", "digits-mlp", "--workers", "2", "--set", "train.epochs=1", "--no-report", "--run")


def manta() -> float:
    with scratch() as folder:
        return fresh_process(*ARGUMENTS, folder / "run")[0]


def other(**settings: str) -> float:
    with scratch() as folder:
        # Ray's usage reports stay off in any case: nothing here should call out
        return fresh_process(BY_HAND / "ray_trainer.py", folder, **{"RAY_USAGE_STATS_ENABLED": "0", **settings})[0]


def main() -> None:
    chosen = options(__doc__, repetitions=3, with_our_settings=1)
    pairs = in_turn(chosen.repetitions, manta, other)
    settled = [other(**SETTINGS) for _ in range(chosen.with_our_settings)]
    publish(
        "startup_ray",
        [Case("digits-mlp", "<= 1.05", "s", pairs)],
        workers=2,
        other_with_our_settings=round(statistics.median(settled), 3) if settled else None,
    )


if __name__ == "__main__":
    main()
