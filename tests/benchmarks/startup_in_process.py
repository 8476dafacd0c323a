"""Start-up in one process: wall time of `manta train digits-mlp --workers 0` against a bare PyTorch script."""

from measuring import BY_HAND, Case, fresh_process, in_turn, options, publish, scratch


def manta() -> float:
    with scratch() as folder:
        return fresh_process("-m", "jobs", "train", "digits-mlp", "--workers", "0", "--run", folder / "run")[0]


def other() -> float:
    return fresh_process(BY_HAND / "digits.py")[0]


def main() -> None:
    chosen = options(__doc__, repetitions=5)
    pairs = in_turn(chosen.repetitions, manta, other)
    publish("startup_in_process", [Case("digits-mlp", "<= 1.5", "s", pairs)])


if __name__ == "__main__":
    main()
