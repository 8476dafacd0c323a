"""W&B: a run of the project $WANDB_PROJECT, or `manta`; kept in ./wandb for `wandb sync` where no key is at hand."""

import os
from collections.abc import Mapping
from typing import Any

from cluster.runs.tracking.tracker import Begun, Ended, Tracker

PROJECT = "manta"
STEP = "step"


class WandB(Tracker):
    """Through wandb's own run object, which leaves standard output and the user's code alone."""

    name = "wandb"
    needs = ("wandb",)

    def begin(self, begun: Begun) -> str:
        """See Tracker. Nobody is asked for a key."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no reports of its own faults to its makers
        import wandb

        mode: Any = None if os.environ.get("WANDB_MODE") or wandb.login(prompt=False) else "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=begun.name,
            config={**begun.parameters, "manta.run": begun.where},
            id=begun.known,
            resume="allow" if begun.known else None,
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        # a run that is started again goes back some steps, which wandb's own steps cannot
        self._run.define_metric("*", step_metric=STEP)
        return str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log({**metrics, STEP: step})

    def end(self, ended: Ended) -> None:
        """See Tracker."""
        import wandb

        self._run.summary.update({f"kept/{name}": value for name, value in ended.metrics.items()})
        report = ended.files.get("report.html")
        if report is not None:
            self._run.log({"report": wandb.Html(str(report), inject=False)})
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
        for name, path in ended.files.items():
            artifact.add_file(str(path), name=name)
        self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if ended.status == "finished" else 1)

    @property
    def where(self) -> str:
        """See Tracker."""
        if self._run.offline:
            return f"{self._run.dir.removesuffix('/files')} (send it with `wandb sync`)"
        return str(self._run.url)
