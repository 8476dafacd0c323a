"""`manta submit`: what train, sweep or doctor would do here, as a job of a cluster that this machine need not be in."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.commands.app import INTERRUPTED, app, complain, import_from_here
from jobs.commands.options import JsonOption
from nn_models.errors import UserError

submit_app = typer.Typer(no_args_is_help=True, help="Run `manta train`, `sweep` or `doctor` as a job of a Ray cluster.")
app.add_typer(submit_app, name="submit")

ServerOption = Annotated[
    str | None, typer.Option(help="The job server: http://HOST:8265 of the head node; else $RAY_API_SERVER_ADDRESS.")
]
Passed = Annotated[
    list[str] | None, typer.Argument(metavar="RECIPE [OPTIONS]", help="The recipe, and the command's options.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow its log to the end; exit as the job does.")]
EnvFile = Annotated[str | None, typer.Option(help="File with lines NAME=VALUE: the job's environment.")]
RuntimeEnv = Annotated[str | None, typer.Option(metavar="FILE", help="YAML of a Ray runtime environment.")]
JobId = Annotated[str | None, typer.Option(help="The job's id; by default its recipe's name and a number.")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="K=V", help="Kept with the job; repeatable.")]
EntryCpus = Annotated[float, typer.Option(min=0, help="CPUs that the job's own process reserves.")]
EntryGpus = Annotated[float, typer.Option(min=0, help="GPUs that it reserves; --workers 0 --gpu needs 1.")]
EntryMemory = Annotated[int, typer.Option(min=0, help="Bytes of memory that it reserves.")]
EntryResources = Annotated[str | None, typer.Option(metavar="JSON", help='Others, as {"special": 1}.')]
WithManta = Annotated[bool, typer.Option("--with-manta", help="Upload this manta too: the cluster has none.")]
OnCluster = Annotated[
    bool, typer.Option("--data-on-cluster", help="The data is on the nodes: do not look for it on this machine.")
]
Limit = Annotated[int, typer.Option(min=1, metavar="MIB", help="The most that is uploaded.")]
Python = Annotated[str, typer.Option(help="The Python of the nodes that runs the job.")]

PASSING = {"ignore_unknown_options": True, "allow_interspersed_args": True}


def _submits(verb: str) -> None:
    """Add `manta submit VERB`, which takes all options of `manta VERB` too."""

    @submit_app.command(verb, context_settings=PASSING, help=f"Submit `manta {verb}`; its options are taken too.")
    def submit(
        arguments: Passed = None,
        address: ServerOption = None,
        wait: Wait = False,
        env_file: EnvFile = None,
        runtime_env: RuntimeEnv = None,
        job_id: JobId = None,
        metadata: Metadata = None,
        entrypoint_num_cpus: EntryCpus = 0,
        entrypoint_num_gpus: EntryGpus = 0,
        entrypoint_memory: EntryMemory = 0,
        entrypoint_resources: EntryResources = None,
        with_manta: WithManta = False,
        data_on_cluster: OnCluster = False,
        upload_limit: Limit = 100,
        python: Python = "python",
        as_json: JsonOption = False,
    ) -> None:
        from cluster.submission.bundle import bundle
        from cluster.submission.client import JobServer, refuse_id
        from jobs.commands.submission import Asked, admit, environment_of, new_id, pairs, show_bundle, start

        import_from_here()
        asked = Asked.of(verb, arguments or [])
        if job_id is not None:
            refuse_id(job_id, "--job-id")
        server = JobServer(address)
        environment = environment_of(runtime_env, env_file)
        asked.refuse_a_place_that_goes(environment["env_vars"])
        here = bundle(Path.cwd(), without=environment.get("excludes") or ())
        show_bundle(here)
        here.refuse_larger(upload_limit)
        entry = {"CPU": entrypoint_num_cpus, "GPU": entrypoint_num_gpus, "memory": float(entrypoint_memory)}
        others = _resources(entrypoint_resources)
        recipe = admit(asked, here, server, entry=entry | others, data_on_cluster=data_on_cluster)
        options: dict[str, Any] = {
            "entrypoint_num_cpus": entrypoint_num_cpus,
            "entrypoint_num_gpus": entrypoint_num_gpus,
            "entrypoint_memory": entrypoint_memory or None,
            "entrypoint_resources": others or None,
            "metadata": {"manta": verb, "recipe": asked.recipe or "", **pairs(metadata, "--metadata")},
        }
        job = job_id or new_id(verb, recipe)
        try:
            start(job, asked, here, server, environment, options, with_manta=with_manta, python=python)
        except KeyboardInterrupt:
            asks = f"`manta jobs status {job} --address {server.url}`"
            message = f"interrupted while the job was submitted; whether it has begun says {asks}"
            raise typer.Exit(complain(message, INTERRUPTED)) from None
        if not wait:
            print(json.dumps({"job": job, "address": server.url}) if as_json else job)
            return
        raise typer.Exit(_to_the_end(server, job, as_json=as_json))


def _to_the_end(server: Any, job: str, *, as_json: bool) -> int:
    from cluster.submission.told import Told
    from jobs.commands.submitted import followed, told_end

    ended = followed(server, job, quiet=as_json)
    if as_json:
        told = Told(server.log(job, missing_ok=True))
        print(json.dumps({**ended.facts(), "run": told.run, "result": told.result}))
    return told_end(ended)


def _resources(text: str | None) -> dict[str, float]:
    try:
        found = json.loads(text or "{}")
        return {str(name): float(amount) for name, amount in found.items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(
            "--entrypoint-resources", f"{text!r} is no JSON of numbers", 'write for example {"special": 1}'
        ) from None


_submits("train")
_submits("sweep")
_submits("doctor")
