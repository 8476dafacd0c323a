"""`manta sweep`, and what show, report and evaluate make of a sweep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import cluster
from cluster.recipe.loading import load_recipe
from cluster.tuning.ledger import SweepState, TrialRecord
from cluster.tuning.target import Target
from jobs.commands.sweep_outcome import reasons
from jobs.commands.sweep_progress import MAX_ROWS, SweepProgress, chosen_rows, values

TINY = ["--set", "sweep.num_trials=3", "--set", "train.epochs=2"]
SPACE = "sweep={space: {%s}, num_trials: 2}"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("recipe", ["digits-mlp", "fashion-mlp", "digits-dcgan"])
def test_recipes_that_can_be_swept(recipe):
    assert load_recipe(recipe).sweep is not None


def test_show_tells_the_plan(manta, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    code, out, _ = manta("show", "digits-mlp", "--set", "train.cpus_per_worker=1")
    assert code == 0
    told = " ".join(out.split())
    assert "optimizer.lr loguniform from 0.0001 to 0.1" in told
    assert "model.hidden choice of [32] | [128] | [256] | [128, 64]" in told
    assert "compared by validation/loss, less is better" in told
    assert "trials 16, searcher random, scheduler asha" in told
    assert "a trial needs 1 CPU, its own process included; 4 at once on 4 CPUs" in told
    assert "16 trials of at most 20 epochs: 320 epochs at most" in told
    assert "asha: rungs at epoch 2, 6, 18" in told


def test_show_as_json_counts_the_driver(manta, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    plan = json.loads(manta("show", "digits-mlp", "--json", "--workers", "2")[1])["sweep"]
    assert plan["trial_needs"] == [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}]
    assert plan["trials_at_once"] == 1
    assert (plan["num_trials"], plan["metric"], plan["mode"]) == (16, "validation/loss", "min")
    assert plan["rungs"] == [2, 6, 18]
    assert plan["longest_epochs"] == 320
    assert json.loads(manta("show", "digits-cnn", "--json")[1])["sweep"] is None
    assert "sweep" not in manta("show", "digits-cnn")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits-cnn"], "sweep: digits-cnn has no section sweep"),
        (["digits-mlp", "--set", SPACE % "optimizer.lrr: {uniform: [0, 1]}"], "did you mean lr?"),
        (["digits-mlp", "--set", SPACE % "optimizer.lr: {choice: []}"], "there is nothing to choose from"),
        (["digits-mlp", "--set", SPACE % "optimizer.lr: {uniform: []}"], "optimizer.lr.uniform: "),
        (["digits-mlp", "--set", SPACE % "optimizer.lr: {loguniform: [0, 1]}"], "optimizer.lr.loguniform: "),
        (["digits-mlp", "--set", "sweep.metric=validation/loos"], "did you mean validation/loss?"),
        (["digits-mlp", "--set", "sweep.metric=test/loss"], "It reports train/loss, train/accuracy, validation/loss"),
        (["digits-mlp", "--set", "sweep.num_trials=0"], "sweep.num_trials: "),
        (["digits-mlp", "--gpu"], "--gpu: a trial needs 1 CPU and 1 GPU, and this machine has no GPU"),
        (["digits-mlp", "--fuse", "on"], "--fuse: 'on' is not auto, off or a number"),
        (["digits-mlp", "--fuse", "1"], "--fuse: '1' is not"),
        (["digits-mlp", "--resume"], "--resume: say which sweep to continue with --run DIR"),
        (["digits-mlp", "--resume", "--run", "typo"], "typo holds no sweep to continue"),
        (["digits-mlp", "--retry-failed"], "--retry-failed: "),
        (["digits-mlp", "--workers", "0"], "Invalid value for '--workers'"),
        (["digits-mlp", "--workers", "100"], "train.global_batch_size: 64 rows cannot be shared by 100"),
        (["digits-mlp", "--concurrency", "0"], "Invalid value for '--concurrency'"),
        (["digits-mlp", "--address", "127.0.0.1:1"], "--address: 127.0.0.1:1: no Ray cluster answers there"),
    ],
)
def test_what_a_user_must_change(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    started = []
    monkeypatch.setattr("ray.init", lambda **options: started.append(options))
    assert message in refused("sweep", *arguments)
    assert list(tmp_path.iterdir()) == []  # nothing was begun
    assert started == []


def test_training_takes_no_notice_of_the_section(tmp_path):
    changes = {"train.epochs": 1}
    swept = cluster.train("digits-mlp", run=str(tmp_path / "a"), overrides=changes)
    plain = cluster.train("digits-mlp", run=str(tmp_path / "b"), overrides={**changes, "sweep": None})
    assert swept.metrics == plain.metrics
    assert (tmp_path / "a" / "recipe.yaml").read_text() == (tmp_path / "b" / "recipe.yaml").read_text()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A tiny sweep by the command, in a process of its own as people run it."""
    run = tmp_path_factory.mktemp("swept") / "sweep"
    command = [sys.executable, "-m", "jobs", "sweep", "digits-mlp", "--run", str(run), "--json", *TINY]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return run, json.loads(ended.stdout), ended.stderr


@pytest.mark.ray
def test_a_sweep(swept):
    run, result, told = swept
    assert result["status"] == "finished"
    assert result["run"] == str(run)
    assert result["report"] == f"{run}/report.html"
    assert sum(result["trials"].values()) == 3
    assert "(3 of 3 ended)" in told
    assert told.count("validation/loss") == 3
    on_disk = json.loads((run / "result.json").read_text())
    assert on_disk["best"] == result["best"]
    assert "All trials" in (run / "report.html").read_text()
    assert yaml.safe_load((run / "best.yaml").read_text())["name"] == "digits-mlp-best"


@pytest.mark.ray
def test_its_best_recipe_trains_and_its_model_is_evaluated(manta, swept, tmp_path):
    run, result, _ = swept
    code, out, _ = manta("evaluate", run, "--json")
    assert code == 0
    tested = {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    assert json.loads(out)["metrics"] == pytest.approx(tested, abs=1e-6)  # float32 sums in another process
    code, out, _ = manta("train", run / "best.yaml", "--run", tmp_path / "again", "--json")
    assert code == 0
    assert json.loads(out)["metrics"] == pytest.approx(result["metrics"], abs=1e-6)


@pytest.mark.ray
def test_its_report_is_written_anew(manta, swept):
    run, _, _ = swept
    (run / "report.html").unlink()
    assert manta("report", run) == (0, f"{run}/report.html\n", "")
    assert manta("report", run / "trials" / "0000")[0] == 0
    assert "All trials" not in (run / "trials" / "0000" / "report.html").read_text()


@pytest.mark.ray
def test_a_finished_sweep_resumed_runs_nothing(swept):
    run, result, _ = swept
    again = [sys.executable, "-m", "jobs", "sweep", str(run / "recipe.yaml"), "--run", str(run), "--resume"]
    ended = subprocess.run([*again, "--no-report"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "ended)" not in ended.stderr
    assert f"best trial               {result['best']['trial']}\n" in ended.stdout
    assert f"{run}/best.yaml" in ended.stdout


@pytest.mark.ray
def test_no_trial_comes_to_a_value(tmp_path):
    wild = "sweep={space: {optimizer: {choice: [{kind: sgd, lr: 1.0e+30}]}}, num_trials: 2, scheduler: none}"
    command = [sys.executable, "-m", "jobs", "sweep", "digits-mlp", "--run", str(tmp_path / "sweep"), "--set", wild]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1, ended.stderr
    assert "failed: trials 0, 1: " in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: no trial came to a value")
    assert "Traceback" not in ended.stderr
    assert "NaN or infinite" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.ray
def test_from_python(tmp_path):
    code = (
        "import cluster, sys\n"
        "o = cluster.sweep('digits-mlp', run=sys.argv[1], overrides={'sweep.num_trials': 2, 'train.epochs': 1})\n"
        "assert isinstance(o, cluster.SweepOutcome) and o.status == 'finished' and len(o.trials) == 2\n"
        "assert cluster.replayed(o.run, o.best_trial.index).optimizer == o.best.optimizer\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sweep")], capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr.decode()


# -- what is shown while it runs ---------------------------------------------------------------------------------------


def trial(index: int, status: str = "finished", value: float | None = None, error: str | None = None) -> TrialRecord:
    return TrialRecord(index, {"optimizer.lr": 0.1 * index}, status, value, epochs=3, error=error)  # type: ignore[arg-type]


def state(records: list[TrialRecord]) -> SweepState:
    return SweepState(Target("validation/loss", "min"), 40, 2, records)


def test_the_table_has_the_best_and_the_running_ones_first():
    records = [trial(index, value=1.0 + index % 7) for index in range(30)]
    records += [trial(30, "running"), trial(31, "running")]
    records[3].value = 0.5
    rows = chosen_rows(state(records))
    assert len(rows) == MAX_ROWS
    assert rows[0].index == 3
    assert [row.index for row in rows[5:7]] == [30, 31]


def test_a_line_is_printed_once_a_trial_ends(capsys):
    progress = SweepProgress("swept")
    records = [trial(0, "running", 2.0)]
    with progress:
        progress(state(records))
        records[0].status = "finished"
        progress(state(records))
        records.append(trial(1, "invalid", error="optimizer.lr: too large\nmore"))
        progress(state(records))
        progress(state(records))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "trial 0    finished  validation/loss 2; 3 epochs; lr 0  (1 of 40 ended)",
        "trial 1    invalid   3 epochs; lr 0.1; optimizer.lr: too large  (2 of 40 ended)",
    ]


def test_trials_of_an_earlier_process_are_not_told_again(capsys):
    progress = SweepProgress("swept")
    records = [trial(0, value=2.0), trial(1, "running")]
    progress(state(records))
    records[1].status = "pruned"
    progress(state(records))
    assert [line[:16] for line in capsys.readouterr().err.splitlines()] == ["trial 1    prune"]
    assert "1 finished, 1 pruned" in progress.summary(state(records))


def test_values_are_named_as_short_as_can_be():
    overrides = {"optimizer": {"kind": "sgd", "lr": 0.012345}, "model": {"kind": "mlp", "hidden": [8, 4]}}
    assert values(overrides) == "optimizer.kind sgd, lr 0.01235, model.kind mlp, hidden [8, 4]"


def test_reasons_are_counted():
    records = [trial(index, "failed", error=f"reason {index % 5}") for index in range(20)]
    lines = reasons([*records, trial(20, "invalid", error="no"), trial(21)])
    assert lines[0] == "failed: trials 0, 5, 10, 15: reason 0"
    assert lines[3:] == ["failed: 2 more reasons; trials.csv has them all", "invalid: trial 20: no"]


def test_an_interrupted_sweep_says_how_to_go_on(manta, monkeypatch, tmp_path):
    def interrupted(recipe, **options):
        Path(options["run"]).mkdir()
        Path(options["run"], "recipe.yaml").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.commands.sweep_outcome.run_sweep_of", interrupted)
    run = tmp_path / "my sweep"
    code, out, err = manta("sweep", "digits-mlp", "--run", run, "--workers", "2", "--concurrency", "3")
    assert (code, out) == (130, "")
    expected = f"manta sweep '{run}/recipe.yaml' --run '{run}' --resume --workers 2 --concurrency 3"
    assert err == f"error: interrupted; to go on: {expected}\n"
