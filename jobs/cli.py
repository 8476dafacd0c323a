"""The `manta` command. Heavy imports (torch, ray) happen inside the commands, so that --help is quick."""

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from nn_models.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train the classic neural-network architectures: in this process, on a local Ray, or on a cluster.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare data as Parquet shards, and look at them.")
app.add_typer(data_app, name="data")

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
PACKAGES = ("cluster", "jobs", "nn_models")

RecipeArgument = Annotated[str, typer.Argument(help="A built-in recipe's name (`manta recipes`) or a YAML file.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Replace a value, e.g. optimizer.lr=3e-4; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
GpuOption = Annotated[bool, typer.Option("--gpu", help="Use a GPU (one for each worker).")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's own messages too.")]


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 the run failed, 2 the user must change something, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    with _messages_shown():
        code = _run_app()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        code = _no_more_output()
    except OSError as error:
        code = _complain(f"standard output: {error.strerror}", USER_ERROR)
        _no_more_output()
    sys.exit(code if isinstance(code, int) else DONE)


def _run_app() -> Any:
    """The exit code, or what the command returned."""
    try:
        _import_from_here()
        return app(standalone_mode=False)
    except SystemExit as ended:  # how typer takes a broken pipe
        return _no_more_output() if isinstance(ended.__context__, BrokenPipeError) else ended.code
    except UserError as error:
        return _complain(str(error), USER_ERROR)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", INTERRUPTED)
    except Exception as error:
        return _other(error)


class _ToStandardError(logging.StreamHandler[Any]):
    """Shows the packages' own messages, on what standard error is at the time: above a progress bar, not across it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self.addFilter(lambda record: record.name.startswith(PACKAGES))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
def _messages_shown() -> Iterator[None]:
    root = logging.getLogger()
    if not any(isinstance(handler, _ToStandardError) for handler in root.handlers):
        root.addHandler(_ToStandardError())  # stays: without any, Python shows what others have to say at its end
    level = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)


def _import_from_here() -> None:
    """Custom models stand where the user is."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory is gone; cd to one that exists") from None
    if here not in sys.path:
        sys.path.insert(0, here)


def _no_more_output() -> int:
    """Whoever read the output has seen enough (`| head`): no failure. Keeps Python from trying again at its end."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    return DONE


def _other(error: Exception) -> int:
    from cluster.errors import RunFailed

    if isinstance(error, RunFailed):
        return _complain(str(error), FAILED)
    if hasattr(error, "format_message"):  # typer's usage errors
        path = getattr(getattr(error, "ctx", None), "command_path", "manta")
        return _complain(f"{error.format_message()} (`{path} --help` tells more)", USER_ERROR)
    raise error


def _complain(message: str, code: int) -> int:
    for line in message.splitlines() or [""]:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    from cluster.training.recipe import parse_yaml

    changes = {}
    for pair in pairs or []:
        path, equals, value = pair.partition("=")
        if not equals or not path:
            raise UserError(f"--set: {pair!r} is not PATH=VALUE; write for example --set optimizer.lr=3e-4")
        changes[path.strip()] = parse_yaml(value, name=f"--set {path}")
    return changes


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run: Annotated[str | None, typer.Option(help="Directory or URI to write; by default a new one in runs/.")] = None,
    workers: Annotated[str, typer.Option(help="Ray workers: 0 trains in this process; MIN-MAX is elastic.")] = "0",
    gpu: GpuOption = False,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster, HOST:PORT.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run.")] = False,
    as_json: JsonOption = False,
    report: Annotated[bool, typer.Option(help="Write RUN/report.html at the end.")] = True,
    verbose: VerboseOption = False,
) -> None:
    """Train a recipe."""
    from cluster.runtime import configure_ray, parse_workers
    from jobs.progress import Progress
    from jobs.show import print_outcome

    least, most = parse_workers(workers)
    configure_ray()
    from cluster.training.recipe import load_recipe
    from cluster.training.run_directory import RunDirectory
    from cluster.training.trainer import new_run_name
    from cluster.training.trainer import train as run_training

    resolved = load_recipe(recipe, _overrides(set_))
    if resume and run is None:
        raise UserError("--resume: say which run to continue with --run DIR")
    run = new_run_name(resolved) if run is None else run
    try:
        with Progress(resolved.name, epochs=resolved.train.epochs) as progress:
            outcome = run_training(
                resolved,
                num_workers=least if least == most else (least, most),
                use_gpu=gpu,
                run=run,
                address=address,
                resume=resume,
                listener=progress,
                verbose=verbose,
            )
    except KeyboardInterrupt:
        message = "interrupted before the run began"
        if RunDirectory(run).exists():
            path = shlex.quote(run)
            line = f"manta train {path}/recipe.yaml --run {path} --resume"
            again = {"--workers": workers if most else None, "--address": address}
            line += "".join(f" {name} {shlex.quote(value)}" for name, value in again.items() if value is not None)
            message = f"interrupted; to go on: {line}{' --gpu' * gpu}"
        raise typer.Exit(_complain(message, INTERRUPTED)) from None
    written = None
    if report:
        from jobs.report import write_report

        written = write_report(outcome.run)
    if as_json:
        print(json.dumps({"run": outcome.run, **outcome.result}))
        return
    rollbacks = outcome.result.get("rollbacks") or []
    facts = {
        "rollbacks": f"{len(rollbacks)}, the last at step {rollbacks[-1]['step']}" if rollbacks else None,
        "ended early": outcome.result.get("ended"),
        "run": outcome.run,
        "report": written,
    }
    print_outcome(outcome.metrics, facts)


@app.command()
def sweep(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run: Annotated[str | None, typer.Option(help="Directory or URI to write; by default a new one in sweeps/.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers of each trial; of a GAN, pairs of halves.")] = 1,
    gpu: GpuOption = False,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster, HOST:PORT.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in --run.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run failed trials again.")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many trials at once; by default all that fit.")
    ] = None,
    fuse: Annotated[
        str, typer.Option(metavar="auto|off|N", help="Train trials that allow it as one batched model, N at most.")
    ] = "auto",
    as_json: JsonOption = False,
    report: Annotated[bool, typer.Option(help="Write SWEEP/report.html at the end.")] = True,
    verbose: VerboseOption = False,
) -> None:
    """Run the trials that a recipe's section sweep describes, and find the best."""
    from jobs.sweeping import Interrupted, print_sweep, run_sweep

    if resume and run is None:
        raise UserError("--resume: say which sweep to continue with --run DIR")
    if retry_failed and not resume:
        raise UserError("--retry-failed: there are failed trials only in a sweep that goes on; add --resume --run DIR")
    try:
        outcome = run_sweep(
            recipe,
            overrides=_overrides(set_),
            run=run,
            workers=workers,
            gpu=gpu,
            address=address,
            resume=resume,
            retry_failed=retry_failed,
            concurrency=concurrency,
            fuse=fuse,
            verbose=verbose,
        )
    except Interrupted as interrupted:
        raise typer.Exit(_complain(str(interrupted), INTERRUPTED)) from None
    written = None
    if report:
        from jobs.report import write_report

        written = write_report(outcome.run)
    print_sweep(outcome, written, as_json=as_json)
    if outcome.best_trial is None:
        raise typer.Exit(_complain("no trial came to a value; the reasons are above and in trials.csv", FAILED))


@app.command()
def show(
    recipe: RecipeArgument,
    set_: SetOption = None,
    workers: Annotated[str, typer.Option(help="Ray workers that the memory, or a trial's needs, are for.")] = "0",
    as_json: JsonOption = False,
) -> None:
    """Show a recipe resolved: layers, parameters, steps, memory; its sweep's space and cost. Trains nothing."""
    from cluster.data.prepare import prepared
    from cluster.runtime import parse_workers
    from cluster.training.recipe import load_recipe
    from cluster.training.summary import summarise
    from jobs.show import print_summary
    from jobs.show_sweep import plan_of

    _, most = parse_workers(workers)
    resolved = load_recipe(recipe, _overrides(set_))
    manifest = prepared(resolved.data).manifest
    resolved.check(manifest)
    plan = plan_of(resolved, manifest, num_workers=max(1, most)) if resolved.sweep else None
    print_summary(resolved, manifest, summarise(resolved, manifest, num_workers=most), plan, as_json=as_json)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A model's kind: show its fields.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the models, or the fields of one."""
    from jobs.show import print_model, print_models

    if name is None:
        print_models(as_json=as_json)
    else:
        print_model(name, as_json=as_json)


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the built-in recipes."""
    from jobs.show import print_recipes

    print_recipes(as_json=as_json)


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[
        str | None, typer.Option(help="Other data: a source's name, a prepared folder, or YAML: '{kind: parquet, …}'.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    gpu: GpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a run's best model, from RUN/model alone."""
    from cluster.data.manifest import SPLITS
    from cluster.training.evaluate_run import evaluate_run, parse_data
    from cluster.training.trainer import local_device
    from jobs.show import print_outcome
    from nn_models.errors import did_you_mean

    if split not in SPLITS:
        raise UserError(f"--split: {split!r} is no split; {did_you_mean(split, SPLITS)}")
    source = None if data is None else parse_data(data).resolved(os.getcwd())
    result = evaluate_run(run, data=source, split=split, device=local_device(gpu))
    if as_json:
        print(json.dumps(result))
        return
    print_outcome(result["metrics"], {"rows": result["rows"]})


@app.command()
def generate(
    run: RunArgument,
    num: Annotated[int, typer.Option(min=1, max=10_000, help="Images to make.")] = 64,
    out: Annotated[str, typer.Option(metavar="FILE.png", help="File to write, or to replace.")] = "samples.png",
    label: Annotated[
        str | None, typer.Option(help="Class to make, by name or number (conditional models); by default each in turn.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise: the same gives the same.")] = 0,
    gpu: GpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw images that a GAN's best generator makes, from RUN/model alone; for pairs: given, made, true."""
    from cluster.training.trainer import local_device
    from jobs.samples import write_samples

    path = write_samples(run, num=num, out=out, label=label, seed=seed, device=local_device(gpu))
    print(json.dumps({"path": path, "num": num, "seed": seed, "label": label}) if as_json else path)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN|SWEEP", help="The directory of a run or a sweep.")],
) -> None:
    """Write report.html of a run or a sweep anew."""
    from jobs.report import write_report

    print(write_report(run))


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
    from cluster.runtime import ray_session
    from cluster.storage import Folder
    from cluster.training.evaluate_run import parse_data
    from jobs.show import print_manifest

    spec = parse_data(source, _overrides(set_), name="SOURCE").resolved(os.getcwd())
    folder = Folder(out)
    if workers:
        with ray_session(address=address, cpus=workers, verbose=False) as session:
            from cluster.data.conversion import ray_mapper

            manifest = write_shards(spec, folder, mapper=ray_mapper(session.ray))
    else:
        manifest = write_shards(spec, folder)
    print_manifest(folder.uri, manifest, as_json=as_json)


@data_app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A prepared data set: the folder with manifest.json, or its URI.")],
    as_json: JsonOption = False,
) -> None:
    """Describe prepared data and verify its checksums."""
    from cluster.data.shards import DataSet
    from jobs.show import print_manifest

    data = DataSet(path)
    data.verify()
    print_manifest(data.folder.uri, data.manifest, as_json=as_json)
