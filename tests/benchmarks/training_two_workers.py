"""Training with two workers: rows a second of manta on Ray against hand-written DDP under torchrun, a thread each."""

import json
from collections.abc import Sequence

from measuring import (
    BATCH,
    BY_HAND,
    MODELS,
    Case,
    epoch_ends,
    fashion,
    fashion_recipe,
    fresh_process,
    in_turn,
    options,
    publish,
    scratch,
)

import cluster
from cluster.data.shards import DataSet

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def compare(model: str, data: DataSet, *, epochs: int, repetitions: int) -> Case:
    recipe = fashion_recipe(model, data, epochs=1 + epochs, cpus_per_worker=1)
    script = (BY_HAND / "two_workers.py", str(data.folder), recipe.model_dump_json(), str(1 + epochs))

    def rate(ends: Sequence[float]) -> float:  # the first epoch is the warm-up
        return data.manifest.rows("train") * (len(ends) - 1) / (ends[-1] - ends[0])

    def manta() -> float:
        with scratch() as folder:
            cluster.train(recipe, num_workers=2, run=str(folder / "run"))
            return rate(epoch_ends(folder / "run"))

    def other() -> float:
        _, printed = fresh_process(*TORCHRUN, *script, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        return rate(json.loads(printed.splitlines()[-1]))

    return Case(model, ">= 0.95", "rows/s", in_turn(repetitions, manta, other, warm_up=False))


def main() -> None:
    chosen = options(__doc__, repetitions=3, epochs=4, rows=12_800)
    with scratch() as folder:
        data = fashion(folder / "data", rows=chosen.rows)
        cases = [compare(model, data, epochs=chosen.epochs, repetitions=chosen.repetitions) for model in MODELS]
    context = {"workers": 2, "threads_per_worker": 1, "batch": BATCH, "rows": chosen.rows, "epochs": chosen.epochs}
    publish("training_two_workers", cases, **context)


if __name__ == "__main__":
    main()
