"""Summary: a model's layers, shapes and parameters and a run's steps and memory, without running anything."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.data.manifest import Manifest
from cluster.data.order import held, training_order
from cluster.recipe.recipe import Recipe
from cluster.runtime.limits import ImpossibleError, refusing_impossible_models
from nn_models.columns import IMAGINED_LENGTH
from nn_models.errors import UserError

STATES_PER_PARAMETER = {"sgd": 0, "adam": 2, "adamw": 2, "rmsprop": 1, "adagrad": 1}


@dataclass(frozen=True)
class Layer:
    """One module without children, or with weights of its own, in the order of its first use."""

    name: str
    kind: str
    output_shape: tuple[int, ...]  # of one row; () where it is not called, but its weights are used
    num_parameters: int  # weights that several layers share count for the first


@dataclass(frozen=True)
class Summary:
    """What `manta show` prints. Memory is in bytes, of one worker."""

    layers: tuple[Layer, ...]
    num_parameters: int
    steps_per_epoch: int
    num_steps: int
    rows: dict[str, int]
    parameter_bytes: int  # weights, gradients, optimizer state, moving average
    activation_bytes: int  # kept for the backward pass of a worker's share of a batch
    data_bytes: int  # splits that are held in memory


def summarise(recipe: Recipe, manifest: Manifest, *, num_workers: int = 1) -> Summary:
    """Build the model without memory and send two imaginary rows through it.

    Raises UserError where the rows do not go through, or come out with the wrong shape.
    """
    try:
        with refusing_impossible_models():
            model, layers, sizes = _rehearse(recipe, manifest, "meta")
    except ImpossibleError:
        raise
    except (Exception, SystemExit):  # tensors without memory have no values, which a custom model may look at
        try:
            with refusing_impossible_models():
                model, layers, sizes = _rehearse(recipe, manifest, "cpu")
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a custom model may raise anything
            raise UserError(
                "model",
                f"{recipe.model.kind} cannot read rows {_shape(manifest)} from {recipe.data.kind}: "
                f"{type(error).__name__}: {first_line(error)}",
            ) from error
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "model", f"{recipe.model.kind} has no weights to train", "give it nn.Parameters that need gradients"
        )
    count = sum(p.numel() for p in model.parameters())
    momentum = 1 if getattr(recipe.optimizer, "momentum", 0) else 0
    copies = 2 + STATES_PER_PARAMETER[recipe.optimizer.kind] + momentum + (1 if recipe.train.ema_decay else 0)
    order = training_order(
        manifest,
        global_batch_size=recipe.train.global_batch_size,
        seed=recipe.train.seed,
        window=recipe.data.shuffle_window,
    )
    batch = min(recipe.train.global_batch_size, order.num_rows)
    share = -(-batch // max(1, num_workers) // recipe.train.accumulation)
    narrow = 2 if recipe.train.precision == "bf16" else 1
    rows = {split: manifest.rows(split) for split in manifest.splits}
    in_memory = sum(n for split, n in rows.items() if held(manifest, split, recipe.data.shuffle_window))
    return Summary(
        layers=tuple(layers),
        num_parameters=count,
        steps_per_epoch=order.num_steps,
        num_steps=order.num_steps * recipe.train.epochs,
        rows=rows,
        parameter_bytes=4 * count * copies,
        activation_bytes=int(share * sum(sizes) * _longer(manifest)) // narrow,
        data_bytes=in_memory * manifest.row_bytes,
    )


def _rehearse(recipe: Recipe, manifest: Manifest, device: str) -> tuple[nn.Module, list[Layer], list[int]]:
    """The model, its layers, and the bytes of a row that each puts out, as two imaginary rows go through it."""
    layers: dict[str, Layer] = {}
    sizes: list[int] = []
    counted: set[nn.Parameter] = set()

    def add(name: str, module: nn.Module, shape: tuple[int, ...]) -> None:
        own = [weight for weight in module.parameters(recurse=False) if weight not in counted]
        counted.update(own)
        layers[name] = Layer(name, type(module).__name__, shape, sum(weight.numel() for weight in own))

    def note(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, tuple):  # a recurrent layer gives its state as well
                output = output[0]
            if isinstance(output, torch.Tensor):
                sizes.append(output.numel() // 2 * output.element_size())
                if name not in layers and not isinstance(module, nn.Identity):  # once, if it is called at each time
                    add(name, module, tuple(output.shape[1:]))

        return hook

    with torch.device(device):
        model = recipe.model.build(manifest.signature)
        parts = [
            (name, module)
            for name, module in model.named_modules()
            if not list(module.children()) or list(module.parameters(recurse=False))
        ]
        hooks = [module.register_forward_hook(note(name)) for name, module in parts]
        recipe.objective.rehearse(recipe.model, model, manifest.signature, source=recipe.data.kind)
    for hook in hooks:
        hook.remove()
    for name, module in parts:  # a cell that takes its layers' weights and does not call them
        if name not in layers and any(weight not in counted for weight in module.parameters(recurse=False)):
            add(name, module, ())
    return model, _in_place(layers, [name for name, _ in parts]), sizes


def _in_place(layers: dict[str, Layer], names: list[str]) -> list[Layer]:
    """The layers in the order of their first use; those that are not called before what follows in the model."""
    listed = [name for name, layer in layers.items() if layer.output_shape]
    for name in (name for name in layers if name not in listed):
        later = set(names[names.index(name) :])
        listed.insert(next((place for place, other in enumerate(listed) if other in later), len(listed)), name)
    return [layers[name] for name in listed]


def _longer(manifest: Manifest) -> float:
    """How many times as long as imagined ones the rows are, where they differ in length."""
    stored = manifest.columns["input"]
    return 1.0 if stored.column.layout == "dense" else max(1.0, stored.elements / IMAGINED_LENGTH)


def _shape(manifest: Manifest) -> str:
    column = manifest.signature["input"]
    return f"of shape {column.row_shape}" if column.layout == "dense" else f"of {column.describe()}"


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that torch's C++ puts behind it."""
    return (str(error).splitlines() or [""])[0]
