"""What `manta submit` does: read the command that is to run there, refuse what cannot run, upload, start the job."""

import logging
import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import typer

from cluster.data.prepare import prepared
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe, parse_yaml, read_recipe
from cluster.recipe.recipe import Recipe
from cluster.runs.admission import refuse_what_cannot_start, workers_of
from cluster.runtime import parse_workers
from cluster.runtime.existing import STORAGE
from cluster.runtime.limits import size
from cluster.submission.bundle import Bundle, wheel
from cluster.submission.client import JobServer
from cluster.submission.told import TELLS
from cluster.training.splits import open_splits
from cluster.tuning.budget import needs_of
from jobs.commands import doctor, sweeping, training  # noqa: F401  # they add the commands that are submitted
from jobs.commands.app import app
from jobs.commands.options import overrides
from jobs.commands.showing_sweep import plan_of
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

STOP_WAIT_S = 60  # Ray kills a job that it stops after 3 s, within which a run may not have written its checkpoint
NETWORK_DISKS = ("nfs", "cifs", "smb", "lustre", "ceph", "gluster", "gpfs", "fuse", "beegfs", "efs", "9p", "afs")


@dataclass(frozen=True)
class Asked:
    """What is to run there: `manta VERB ARGUMENTS`, and what its own command line makes of the arguments."""

    verb: str
    arguments: tuple[str, ...]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, verb: str, arguments: Sequence[str]) -> "Asked":
        """Raises typer's usage error where the command would, and UserError for what makes no sense in a job."""
        commands: Any = typer.main.get_command(app)  # a group of click's, or of the one that typer brings
        context = commands.commands[verb].make_context(f"manta submit {verb}", list(arguments))
        return cls(verb, tuple(arguments), context.params)

    def refuse_a_place_that_goes(self, variables: Mapping[str, str]) -> None:
        """Raise UserError where the run would be in the job's own folder; log where that is not known here."""
        run = self.options["run"]
        if run is None and STORAGE not in variables:
            logger.warning("--run: not given: the nodes' $%s decides, and a job without it is refused there", STORAGE)
        elif run is not None and "://" not in run and not Path(run).is_absolute():
            raise UserError(
                "--run",
                f"{run} would be in the job's own folder, which goes with the cluster",
                "give a URI, or a folder from / on, that all nodes reach",
            )

    @property
    def recipe(self) -> str | None:
        """As it was given; the doctor may have none."""
        recipe: str | None = self.options["recipe"]
        return recipe

    def bundles(self, recipe: Recipe) -> list[dict[str, float]]:
        """What it reserves in the cluster at once, at the least."""
        if self.verb == "sweep":
            workers = workers_of(recipe, int(self.options["workers"]), self.options["gpu"], alone=False)
            return needs_of(workers).all
        workers = workers_of(recipe, parse_workers(self.options["workers"]), self.options["gpu"], alone=False)
        return [workers.bundle] * workers.least


def show_bundle(here: Bundle) -> None:
    """Say how much is uploaded, the largest first."""
    largest = ", ".join(f"{name} {size(num)}" for name, num in here.largest())
    told = f"to be uploaded: {here.root}, {len(here.files)} files, {size(here.num_bytes)}"
    print(f"{told} ({largest})" if largest else told, file=sys.stderr, flush=True)


# -- what cannot run is refused ----------------------------------------------------------------------------------------


def admit(
    asked: Asked, here: Bundle, server: JobServer, *, entry: Mapping[str, float], data_on_cluster: bool
) -> Recipe | None:
    """The recipe. Raises UserError for what cannot run there, before anything is uploaded."""
    if asked.recipe is None:
        return None
    changes = overrides(asked.options["set_"])
    recipe = load_recipe(asked.recipe, changes)
    if asked.verb == "sweep" and recipe.sweep is None:
        raise UserError("sweep", f"{recipe.name} has no section sweep, which says what to try", "add one with a space")
    _refuse_a_recipe_that_stays(asked.recipe, here)
    local = all(node.here for node in server.nodes())
    named = _paths(read_recipe(asked.recipe, changes), recipe)
    _refuse_data_that_stays(named, here, everywhere=local or data_on_cluster)
    if asked.verb == "doctor":  # it says itself what else stands in the way
        return recipe
    if not data_on_cluster and _is_read_here(recipe, named, here, local=local):
        _refuse_what_cannot_start(asked, recipe)
    else:
        logger.info("the data is looked at in the job only")
    bundles = asked.bundles(recipe)
    if not bundles:
        _say_what_trains(asked, entry)
    each = " and ".join(f"{amount:g} {name}" for name, amount in (bundles[0] if bundles else {}).items())
    what = f"a trial's {len(bundles)} processes" if asked.verb == "sweep" else f"{len(bundles)} workers of {each} each"
    if bundles:
        server.refuse_unplaceable(bundles, what)
    if any(entry.values()):
        server.refuse_unplaceable([dict(entry)], "the job's own process")
    return recipe


def new_id(verb: str, recipe: Recipe | None) -> str:
    """An id for a job, known before the server is asked: what became of it can then be found out in any case."""
    name = verb if recipe is None or verb == "doctor" else recipe.name[:60]
    return f"{name}-{secrets.token_hex(4)}"


def _say_what_trains(asked: Asked, entry: Mapping[str, float]) -> None:
    """Of --workers 0. Raises UserError where it wants a GPU that it does not reserve."""
    if asked.options["gpu"] and not entry.get("GPU"):
        raise UserError(
            "--gpu",
            "--workers 0 trains in the job's own process, which reserves no GPU",
            "give --workers 1 or more, or --entrypoint-num-gpus 1",
        )
    if not any(entry.values()):
        logger.info("--workers 0: the job trains in its own process, on the head node")


def _refuse_a_recipe_that_stays(recipe: str, here: Bundle) -> None:
    path = Path(recipe)
    if "://" in recipe or not path.is_file():
        return  # built in
    if path.is_absolute() or not here.holds(path):
        why = "an absolute path is of this machine" if path.is_absolute() else "it is not uploaded"
        fix = f"give one in {here.root} that .gitignore, .rayignore and run directories do not leave out"
        raise UserError(recipe, why, fix)


@dataclass(frozen=True)
class _Named:
    """A path that a recipe names, in which field, and whether it was relative there."""

    field: str
    path: Path
    relative: bool


def _paths(written: Recipe, recipe: Recipe) -> list[_Named]:
    """The recipe's paths on this machine's disks: all texts that begin with / once they are made absolute."""
    before, after = (
        {f"{section}.{field}": value for section in ("data", "model") for field, value in dump[section].items()}
        for dump in (written.model_dump(mode="json"), recipe.model_dump(mode="json"))
    )
    of_models = {f"model.{field}" for field in recipe.model.files}
    return [
        _Named(field, Path(os.path.normpath(value)), not str(before.get(field)).startswith("/"))
        for field, value in after.items()
        if (field.startswith("data.") or field in of_models) and isinstance(value, str) and value.startswith("/")
    ]


def _is_read_here(recipe: Recipe, named: Sequence[_Named], here: Bundle, *, local: bool) -> bool:
    """Whether the data is looked at before it is submitted: not what is large, and would be converted here in vain."""
    texts = [value for value in recipe.data.model_dump(mode="json").values() if isinstance(value, str)]
    if not all(one.path.exists() for one in named):
        return False
    if recipe.data.prepared_at or local:
        return True
    return not any("://" in text for text in texts) and all(one.path.is_relative_to(here.root) for one in named)


def _refuse_data_that_stays(named: Sequence[_Named], here: Bundle, *, everywhere: bool) -> None:
    """Raise UserError for data that only this machine has."""
    for one in named:
        inside = one.path.is_relative_to(here.root)
        if one.relative and inside:
            if one.path.exists() and not here.holds(one.path):
                fix = "take it out of .gitignore or .rayignore, or put it on shared storage"
                raise UserError(one.field, f"{one.path} is not uploaded", fix)
        elif not everywhere and one.path.exists() and (one.relative or inside or not _on_network(one.path)):
            raise UserError(
                one.field,
                f"{one.path} is on this machine only",
                f"name it relative to {here.root}, put it on shared storage, or say that nodes have it with "
                "--data-on-cluster",
            )


def _on_network(path: Path) -> bool:
    """Whether a path is on a disk that other machines may have too."""
    mounts = {Path(part.mountpoint): part.fstype.lower() for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[above] for above in (path.resolve(), *path.resolve().parents) if above in mounts), "")
    return any(name in kind for name in NETWORK_DISKS)


def _refuse_what_cannot_start(asked: Asked, recipe: Recipe) -> None:
    """What `manta train` or `manta sweep` would refuse here, too."""
    base = recipe.model_copy(update={"sweep": None})
    data = prepared(recipe.data)
    check(base, data.manifest)
    if asked.verb == "sweep":
        plan_of(recipe, data.manifest, num_workers=int(asked.options["workers"]))
        return
    least, most = parse_workers(asked.options["workers"])
    # as with GPUs: it is not this machine's memory that counts
    workers = workers_of(recipe, (max(1, least), max(1, most)), True, alone=False)
    refuse_what_cannot_start(base, open_splits(data, window=recipe.data.shuffle_window), workers)


# -- and the rest is started -------------------------------------------------------------------------------------------


def environment_of(runtime_env: str | None, env_file: str | None) -> dict[str, Any]:
    """The job's Ray runtime environment. Raises UserError for files that are none."""
    found = parse_yaml(_text(runtime_env, "--runtime-env"), name=runtime_env) if runtime_env else {}
    if not isinstance(found, Mapping):
        raise UserError(str(runtime_env), "not the mapping of a runtime environment", "see Ray's documentation")
    if "working_dir" in found:
        raise UserError(str(runtime_env), "working_dir: the current directory is uploaded", "leave it out")
    variables_there, patterns = found.get("env_vars") or {}, found.get("excludes") or []
    if not isinstance(variables_there, Mapping):
        raise UserError(f"{runtime_env}: env_vars", "not a mapping", "write NAME: VALUE in it")
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise UserError(f"{runtime_env}: excludes", "not a list of patterns", "write them as in .gitignore")
    lines = [line.strip() for line in _text(env_file, "--env-file").splitlines()] if env_file else []
    given = [line.removeprefix("export ") for line in lines if line and not line.startswith("#")]
    variables = {name: value.strip("\"'") for name, value in pairs(given, str(env_file)).items()}
    set_there = {str(name): str(value) for name, value in variables_there.items()}
    ours = {TELLS: "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    return {**found, "env_vars": ours | set_there | variables}


def pairs(texts: Sequence[str] | None, what: str) -> dict[str, str]:
    """`K=V` as a mapping. Raises UserError for what is none."""
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UserError(what, f"{text!r} is not NAME=VALUE", "write for example NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def _text(file: str | None, option: str) -> str:
    try:
        return Path(str(file)).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(option, f"{file} cannot be read ({error})", "check the path") from None


def start(
    job: str,
    asked: Asked,
    here: Bundle,
    server: JobServer,
    environment: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    with_manta: bool,
    python: str,
) -> None:
    """Upload and start the job, and say so."""
    runtime_env = {**environment, "working_dir": str(here.root)}
    runtime_env["excludes"] = [*here.excludes, *(runtime_env.get("excludes") or [])]
    # where the packages are not in the upload, nothing in it takes their place, or that of a library
    entrypoint = [python, *([] if here.has_manta else ["-P"]), "-m", "jobs", asked.verb, *asked.arguments]
    with ExitStack() as stack:
        if with_manta:
            built = stack.enter_context(wheel())
            print(f"uploading manta, {size(built.stat().st_size)}: the cluster needs none", file=sys.stderr, flush=True)
            runtime_env["py_modules"] = [*runtime_env.get("py_modules", []), server.upload_zip(built)]
        server.submit(job, shlex.join(entrypoint), runtime_env, **options)
    print(f"submitted {job} to {server.url}", file=sys.stderr, flush=True)
