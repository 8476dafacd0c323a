"""`manta show`, `models` and `recipes`: what there is, and what a recipe asks for."""

from typing import Annotated

import typer

from jobs.commands.app import app, import_from_here
from jobs.commands.options import JsonOption, RecipeArgument, SetOption, overrides


@app.command()
def show(
    recipe: RecipeArgument,
    set_: SetOption = None,
    workers: Annotated[str, typer.Option(help="Ray workers that the memory, or a trial's needs, are for.")] = "0",
    as_json: JsonOption = False,
) -> None:
    """Show a recipe resolved: layers, parameters, steps, memory; its sweep's space and cost. Trains nothing."""
    from cluster.data.prepare import prepared
    from cluster.recipe.fit import check, warn_about_classes
    from cluster.recipe.loading import load_recipe
    from cluster.runs.summary import summarise
    from cluster.runtime import parse_workers
    from jobs.commands.printing import print_summary
    from jobs.commands.showing_sweep import plan_of

    import_from_here()
    _, most = parse_workers(workers)
    resolved = load_recipe(recipe, overrides(set_))
    manifest = prepared(resolved.data).manifest
    check(resolved, manifest)
    warn_about_classes(manifest, resolved)
    plan = plan_of(resolved, manifest, num_workers=max(1, most)) if resolved.sweep else None
    print_summary(resolved, manifest, summarise(resolved, manifest, num_workers=most), plan, as_json=as_json)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A model's kind: show its fields.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the models, or the fields of one."""
    from jobs.commands.printing import print_model, print_models

    if name is None:
        print_models(as_json=as_json)
    else:
        print_model(name, as_json=as_json)


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the built-in recipes."""
    from jobs.commands.printing import print_recipes

    print_recipes(as_json=as_json)
