"""Trials by Optuna alone in one process: argv is the number of trials and a recipe as JSON. Prints the seconds."""

import json
import sys
import time

import optuna
from tune_trials import fit


def main() -> None:
    trials, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    began = time.perf_counter()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    study.optimize(
        lambda trial: fit({**settings, "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}), n_trials=trials
    )
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
