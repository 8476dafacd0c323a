"""A hand-written data-parallel loop for torchrun: argv is the shards' folder, a recipe as JSON, and the epochs."""

import json
import sys
from time import perf_counter

import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cluster.data.rows import table_rows
from cluster.data.scaling import Scaling
from cluster.data.shards import DataSet
from cluster.recipe.recipe import Recipe


def main() -> None:
    folder, recipe_json, epochs = sys.argv[1:]
    recipe, data = Recipe.model_validate_json(recipe_json), DataSet(folder)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()

    rows = table_rows(data.table("train"), data.manifest)
    stored = {name: torch.from_numpy(layout.values.copy()) for name, layout in rows.columns.items()}
    scaled = Scaling(data.manifest.columns, "standard", torch.device("cpu"))(stored)
    inputs, targets = scaled["input"], scaled["target"]
    torch.manual_seed(0)
    model = DistributedDataParallel(recipe.model.build(data.manifest.signature))
    optimizer = recipe.optimizer.build(model.parameters())
    ends = []
    for epoch in range(int(epochs)):
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(recipe.train.global_batch_size):
            chosen = batch[rank::world_size]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
        ends.append(perf_counter())
    if rank == 0:
        print(json.dumps(ends))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
