"""Where and how models are trained: data, the loop, Ray. `train`, `sweep`, `evaluate`, `open_model` are the way in."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.inference.evaluate import evaluate_run as evaluate
    from cluster.recipe.loading import load_recipe
    from cluster.runs.opened import open_model
    from cluster.runs.train import Outcome, train
    from cluster.tuning.outcome import SweepOutcome, replayed
    from cluster.tuning.sweep import sweep

__all__ = ["Outcome", "SweepOutcome", "evaluate", "load_recipe", "open_model", "replayed", "sweep", "train"]

_HOMES = {
    "train": ("cluster.runs.train", "train"),
    "Outcome": ("cluster.runs.train", "Outcome"),
    "load_recipe": ("cluster.recipe.loading", "load_recipe"),
    "open_model": ("cluster.runs.opened", "open_model"),
    "evaluate": ("cluster.inference.evaluate", "evaluate_run"),
    "sweep": ("cluster.tuning.sweep", "sweep"),
    "SweepOutcome": ("cluster.tuning.outcome", "SweepOutcome"),
    "replayed": ("cluster.tuning.outcome", "replayed"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes two seconds, and Ray as long again."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cluster' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
