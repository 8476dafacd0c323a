"""What `manta show` tells of a recipe's sweep: the space, what one trial needs, how many fit at once, the cost."""

import os
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.data.manifest import Manifest
from cluster.recipe.recipe import Recipe
from cluster.runs.admission import workers_of
from cluster.tuning.budget import Budget, Needs, budget, needs_of, room_for
from cluster.tuning.space import Space
from cluster.tuning.target import Target, target


@dataclass(frozen=True)
class Plan:
    """A sweep before it is run."""

    space: list[tuple[str, str]]  # path, what it is drawn from
    searcher: str
    scheduler: str
    target: Target
    needs: Needs  # of one trial
    at_once: int  # trials, on this machine
    fits: bool  # False: one does only because the embedded Ray always has room for one
    cpus: int  # of this machine
    budget: Budget

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "space": dict(self.space),
            "num_trials": self.budget.num_trials,
            "metric": self.target.metric,
            "mode": self.target.mode,
            "searcher": self.searcher,
            "scheduler": self.scheduler,
            "trial_needs": self.needs.all,
            "trials_at_once": self.at_once,
            "epochs_of_a_trial": self.budget.epochs,
            "longest_epochs": self.budget.longest,
            "rungs": list(self.budget.rungs),
            "promoted_epochs": self.budget.promoted,
            "perturb_every": self.budget.perturb_every,
        }

    def print_on(self, console: Console) -> None:
        """For people, after what `manta show` tells of the recipe itself."""
        console.print()
        table = Table("sweep", "drawn from", box=None, pad_edge=False, header_style="bold")
        for path, words in self.space:
            table.add_row(Text(path), Text(words))
        console.print(table)
        console.print()
        better = "less" if self.target.mode == "min" else "more"
        console.print(f"compared by      {self.target.metric}, {better} is better")
        console.print(
            f"trials           {self.budget.num_trials}, searcher {self.searcher}, scheduler {self.scheduler}"
        )
        cpus = f"{self.cpus} CPU{'s' * (self.cpus != 1)}"
        shared = "" if self.fits else ", which it then shares"
        console.print(
            f"a trial needs    {self.needs.text}, its own process included; {self.at_once} at once on {cpus}{shared}"
        )
        first, *others = self.budget.lines()
        console.print(f"cost             {first}")
        for line in others:
            console.print(f"                 {line}")


def plan_of(recipe: Recipe, manifest: Manifest, *, num_workers: int) -> Plan:
    """The plan of a recipe with a sweep section. Raises UserError where the sweep would be refused."""
    assert recipe.sweep is not None
    space = Space(recipe.sweep)
    space.check(recipe, manifest)
    found = target(recipe, manifest)
    needs = needs_of(workers_of(recipe, num_workers, False, alone=False))
    cpus = os.cpu_count() or 1
    room = room_for(needs, [{"CPU": cpus}])
    return Plan(
        space=space.describe(),
        searcher=recipe.sweep.searcher,
        scheduler=recipe.sweep.scheduler,
        target=found,
        needs=needs,
        at_once=max(1, room),
        fits=room > 0,
        cpus=cpus,
        budget=budget(recipe),
    )
