"""Arguments and options that several commands take."""

from typing import Annotated, Any

import typer

from nn_models.errors import UserError

RecipeArgument = Annotated[str, typer.Argument(help="A built-in recipe's name (`manta recipes`) or a YAML file.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Replace a value, e.g. optimizer.lr=3e-4; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
GpuOption = Annotated[bool, typer.Option("--gpu", help="Use a GPU (one for each worker).")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's own messages too.")]

TrackOption = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="TRACKER", help="Track it with mlflow, wandb or tensorboard; repeatable."),
]


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """What `--set PATH=VALUE` asks for, by dotted path; values are YAML."""
    from cluster.recipe.loading import parse_yaml

    changes = {}
    for pair in pairs or []:
        path, equals, value = pair.partition("=")
        if not equals or not path:
            raise UserError("--set", f"{pair!r} is not PATH=VALUE", "write for example --set optimizer.lr=3e-4")
        changes[path.strip()] = parse_yaml(value, name=f"--set {path}")
    return changes
