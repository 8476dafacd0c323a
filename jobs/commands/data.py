"""`manta data prepare` and `inspect`."""

import os
from typing import Annotated

import typer

from jobs.commands.app import data_app
from jobs.commands.options import JsonOption, SetOption, overrides


@data_app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="A source's name, or YAML like '{kind: image_folder, path: photos}'.")],
    out: Annotated[str, typer.Option(help="Folder or URI to write the shards to; it must be new or empty.")],
    set_: SetOption = None,
    workers: Annotated[int, typer.Option(min=0, help="Convert with Ray Data on so many CPUs; 0 in this process.")] = 0,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster to convert on.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a source as Parquet shards with a manifest."""
    from cluster.data.prepare import prepare as write_shards
    from cluster.recipe.fit import warn_about_classes
    from cluster.recipe.loading import parse_data
    from cluster.runtime import ray_session
    from cluster.runtime.existing import existing
    from cluster.storage import Folder
    from jobs.commands.printing import print_manifest

    spec = parse_data(source, overrides(set_), name="SOURCE").resolved(os.getcwd())
    folder = Folder(out)
    if workers:
        with ray_session(address=existing(address), cpus=workers, verbose=False) as session:
            from cluster.data.conversion import ray_mapper

            manifest = write_shards(spec, folder, mapper=ray_mapper(session.ray))
    else:
        manifest = write_shards(spec, folder)
    print_manifest(folder.uri, manifest, as_json=as_json)
    warn_about_classes(manifest)


@data_app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A prepared data set: the folder with manifest.json, or its URI.")],
    as_json: JsonOption = False,
) -> None:
    """Describe prepared data and verify its checksums."""
    from cluster.data.shards import DataSet
    from jobs.commands.printing import print_manifest

    data = DataSet(path)
    data.verify()
    print_manifest(data.folder.uri, data.manifest, as_json=as_json, verified=True)
