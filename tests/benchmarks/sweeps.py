"""Sweeps: trials an hour of `manta sweep` against plain Tune (functions; Ray Train in each trial) and Optuna alone.

Each side is a process of its own, from its start to its end, on two CPUs; every trial trains to its end.
"""

import json

from measuring import BY_HAND, Case, fresh_process, options, publish, scratch

# on one core a trial of each takes about 0.1 s, 1 s and 10 s
SIZES = {
    "tiny": {"hidden": 64, "epochs": 10},
    "small": {"hidden": 512, "epochs": 40},
    "medium": {"hidden": 1024, "epochs": 300},
}
WANTED = {"tiny": (">= 12", ">= 1.8"), "small": (">= 1", ">= 1"), "medium": (">= 1", ">= 1")}
SWEEP = (
    "import json, sys; from cluster.tuning.sweep import sweep;"
    "sweep(json.loads(sys.argv[1]), run=sys.argv[2], fuse=sys.argv[3])"
)


def recipe(size: str, trials: int) -> str:
    settings = SIZES[size]
    return json.dumps(
        {
            "name": size,
            "model": {"kind": "mlp", "hidden": [settings["hidden"]]},
            "data": {"kind": "digits"},
            "train": {"epochs": settings["epochs"], "global_batch_size": 64, "cpus_per_worker": 1},
            "sweep": {
                "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}},
                "num_trials": trials,
                "scheduler": "none",
            },
        }
    )


def of_manta(size: str, trials: int, *, fuse: str) -> float:
    """Trials an hour."""
    with scratch() as folder:
        wall_s, _ = fresh_process("-c", SWEEP, recipe(size, trials), folder / "sweep", fuse, OMP_NUM_THREADS="1")
    return 3600 * trials / wall_s


def of_tune(how: str, size: str, trials: int) -> float:
    wall_s, _ = fresh_process(
        BY_HAND / "tune_trials.py", how, str(trials), json.dumps(SIZES[size]), OMP_NUM_THREADS="1"
    )
    return 3600 * trials / wall_s


def of_optuna(size: str, trials: int) -> float:
    wall_s, _ = fresh_process(BY_HAND / "optuna_trials.py", str(trials), json.dumps(SIZES[size]), OMP_NUM_THREADS="1")
    return 3600 * trials / wall_s


def main() -> None:
    chosen = options(__doc__, trials=32, ray_train_trials=3, repetitions=1)
    cases = []
    for size in SIZES:
        one_by_one = [of_manta(size, chosen.trials, fuse="off") for _ in range(chosen.repetitions)]
        fused = [of_manta(size, chosen.trials, fuse="auto") for _ in range(chosen.repetitions)]
        functions = [of_tune("function", size, chosen.trials) for _ in range(chosen.repetitions)]
        alone = [of_optuna(size, chosen.trials) for _ in range(chosen.repetitions)]
        in_train = [of_tune("ray_train", size, chosen.ray_train_trials) for _ in range(chosen.repetitions)]
        bounds = WANTED[size]
        cases += [
            Case(
                f"{size}, Ray Train in each trial", bounds[0], "trials/h", list(zip(one_by_one, in_train, strict=True))
            ),
            Case(f"{size}, Tune functions", bounds[1], "trials/h", list(zip(one_by_one, functions, strict=True))),
            Case(f"{size}, Optuna in one process", ">= 0.1", "trials/h", list(zip(one_by_one, alone, strict=True))),
            Case(f"{size}, fused against one by one", ">= 0.8", "trials/h", list(zip(fused, one_by_one, strict=True))),
        ]
    publish("sweeps", cases, trials=chosen.trials, ray_train_trials=chosen.ray_train_trials)


if __name__ == "__main__":
    main()
