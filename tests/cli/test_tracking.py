"""`manta train --track`: a run is found by MLflow's own client, and in W&B's offline file; nothing is sent anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NO_SOCKETS = """
import socket

def refuse(self, address, *rest):
    if self.family != socket.AF_UNIX:
        open("sockets", "a").write(f"{address}\\n")
        raise OSError("no socket was asked for")

socket.socket.connect = socket.socket.connect_ex = refuse
"""

# MLflow's client, as its users have it
FOUND = """
import json, sys
from mlflow import MlflowClient

client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("manta")
found = []
for run in client.search_runs([experiment.experiment_id], "params.`model.kind` = 'mlp'"):
    history = client.get_metric_history(run.info.run_id, "validation/accuracy")
    artifacts = [file.path for folder in ("", "model") for file in client.list_artifacts(run.info.run_id, folder)]
    found.append({
        "name": run.info.run_name, "status": run.info.status, "params": run.data.params, "metrics": run.data.metrics,
        "history": [[point.step, point.value] for point in history], "artifacts": artifacts,
        "model": client.download_artifacts(run.info.run_id, "model/model.safetensors"),
    })
print(json.dumps(found))
"""


def run_python(folder: Path, *arguments: object, **variables: str) -> str:
    """What a Python process of its own prints; it has to end well."""
    here = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "WANDB_"))}
    here |= {"PYTHONPATH": os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[2])]), **variables}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=here, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "no longer tracked" not in done.stderr, done.stderr
    return done.stdout


def train(folder: Path, *options: object, **variables: str) -> dict[str, Any]:
    """Train two epochs; what --json says."""
    told = ("-m", "jobs", "train", "digits-mlp", "--set", "train.epochs=2", "--run", "run", "--json")
    found: dict[str, Any] = json.loads(run_python(folder, *told, *options, **variables))
    return found


@pytest.fixture
def no_sockets(tmp_path) -> Path:
    """A folder whose Python processes note what they try to connect to."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_SOCKETS)
    return tmp_path


def test_mlflows_own_client_finds_the_run(no_sockets):
    uri = f"sqlite:///{no_sockets}/tracked.db"
    outcome = train(no_sockets, "--track", "mlflow", MLFLOW_TRACKING_URI=uri)
    (no_sockets / "run" / "result.json").unlink()  # as if it had been stopped just before its end
    train(no_sockets, "--resume", MLFLOW_TRACKING_URI=uri)
    assert not (no_sockets / "sockets").exists()

    (run,) = json.loads(run_python(no_sockets, "-c", FOUND, uri))  # one, although it was continued
    assert (run["name"], run["status"]) == ("run", "FINISHED")
    assert run["params"]["optimizer.lr"] == "0.003"
    assert run["params"]["train.epochs"] == "2"
    lines = [json.loads(line) for line in (no_sockets / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = [[line["step"], line["accuracy"]] for line in lines if line["split"] == "validation"]
    assert run["history"] == wanted
    assert run["metrics"]["kept/test/accuracy"] == outcome["metrics"]["test/accuracy"]
    assert {"report.html", "recipe.yaml", "result.json", "model/recipe.yaml"} <= set(run["artifacts"])
    assert Path(run["model"]).read_bytes() == (no_sockets / "run" / "model" / "model.safetensors").read_bytes()


def test_without_a_key_wandb_keeps_the_run_here(tmp_path):
    (tmp_path / "home").mkdir()
    train(tmp_path, "--track", "wandb", HOME=str(tmp_path / "home"), NETRC=str(tmp_path / "home" / "netrc"))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for part in (b"optimizer.lr", b"validation/accuracy", b"kept/test/accuracy", b"model/model.safetensors"):
        assert part in content


def test_what_is_no_tracker(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("train", "digits-mlp", "--track", "mlfow")
    assert message == "--track: 'mlfow' is no tracker; did you mean mlflow?"
    assert os.listdir(tmp_path) == []
