"""What `manta generate` writes: rows that a run's best generator makes, as one picture."""

import math
from collections.abc import Sequence

import torch

from cluster.inference.generate import Generated, generate
from cluster.pictures import beside, png
from cluster.runs.opened import Writer, open_model
from cluster.storage import Folder
from cluster.training.run_directory import RECIPE, RunDirectory
from jobs.commands.places import place_of, write_whole
from nn_models.errors import UserError

MAX_COLUMNS_OF_CLASSES = 20
PATH_COLUMNS = 16  # of a path from row to row, which goes on in the next line


def write_samples(
    run: str,
    *,
    num: int,
    out: str,
    label: str | None = None,
    seed: int = 0,
    between: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> str:
    """Write `num` images that a run makes to `out`, a PNG file that is replaced whole, and return where it is.

    Raises UserError where that cannot be written, before anything is made, and where the run makes no such images.
    """
    place = place_of(out, [".png"], what="a PNG file")
    generated = generate(run, num=num, label=label, seed=seed, between=between, device=device)
    if generated.made.dim() != 4:
        raise UserError(
            run,
            f"its rows are {generated.made[0].numel()} numbers each, no images",
            "load the generator in Python: cluster.inference.generate",
        )
    return write_whole(place, picture(generated), out=out)


def writes(run: str) -> bool:
    """Whether the run's model goes on with a text."""
    return RunDirectory(Folder(run)).recipe(f"model/{RECIPE}").objective.writes


def write_text(
    run: str,
    *,
    num: int,
    prompt: str,
    temperature: float | None,
    seed: int,
    out: str | None,
    device: torch.device,
    quiet: bool = False,
) -> str:
    """Print the prompt and what follows it, token by token, or write it to `out`. Returns all of it.

    Raises UserError where the prompt has tokens that the model does not know, or the file cannot be written.
    """
    model = open_model(run, device=device)
    assert isinstance(model, Writer)
    pieces = model.write(num, prompt=prompt, temperature=1.0 if temperature is None else temperature, seed=seed)
    text = prompt
    aloud = out is None and not quiet
    if aloud:
        print(prompt, end="", flush=True)
    for piece in pieces:
        text += piece
        if aloud:
            print(piece, end="", flush=True)
    if aloud:
        print()
    if out is not None:
        folder, name = Folder(out.rpartition("/")[0] or ("/" if out.startswith("/") else ".")), out.rpartition("/")[2]
        write_whole((folder, name), f"{text}\n".encode(), out=out)
    return text


def picture(generated: Generated) -> bytes:
    """A PNG file: about as wide as high; of pairs each with what it was made from and what it should be."""
    made, given, true = generated.made, generated.given, generated.true
    if given is not None and true is not None:
        return png(beside(given, made, true), columns=3 * max(1, round(math.sqrt(len(made) / 3))))
    columns = min(len(made), PATH_COLUMNS) if generated.path else math.ceil(math.sqrt(len(made)))
    if generated.num_classes and generated.num_classes <= MAX_COLUMNS_OF_CLASSES:
        columns = generated.num_classes  # each column is a class
    return png(beside(made), columns=columns)
