"""The report: what a run holds is on the page, what it lacks is named there, and nothing in it can break or run."""

import base64
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from jobs.report import charts, sections, write_report
from jobs.report.charts import metric_charts
from jobs.report.sections import SECTIONS
from nn_models.batch import Batch, Place
from nn_models.classification import ClassificationSpec
from nn_models.errors import UserError
from nn_models.objectives import SupervisedSpec, only_here
from nn_models.regression import RegressionSpec
from nn_models.signature import Signature
from nn_models.zoo import METRICS, OBJECTIVES

VOID = {"meta", "img", "br"}
RECIPE = """name: digits-cnn
model: {kind: cnn, channels: [8]}
data: {kind: digits}
objective: {kind: classification}
optimizer: {kind: adamw, lr: 0.001}
train: {epochs: 4, global_batch_size: 64, precision: fp32, seed: 0}
"""


class Page(HTMLParser):
    """Collects a page's text, headings, alternatives and addresses; refuses tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.alternatives: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        assert self.open == []
        self.words = " ".join(" ".join(self.text).replace("\u202f", " ").split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attributes[key] for key in ("src", "href", "data", "action") if key in attributes]
        self.alternatives += [attributes[key] for key in ("alt", "aria-label") if attributes.get(key)]
        assert tag != "img" or "alt" in attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3", "summary"):
            self.headings.append(data.strip())
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def metrics(num_epochs: int = 4, steps_per_epoch: int = 10) -> list[dict[str, Any]]:
    """Two intervals, an average and a validation line each epoch, and the test at the end."""
    lines: list[dict[str, Any]] = []
    for epoch in range(num_epochs):
        for step in (epoch * steps_per_epoch + steps_per_epoch // 2, (epoch + 1) * steps_per_epoch):
            line = {"step": step, "epoch": epoch, "split": "train", "loss": 2 / step, "accuracy": 1 - 1 / step}
            lines.append(line | {"learning_rate": 1e-3, "grad_norm": 1.5, "rows_per_s": 9000.0, "time_s": 0.1 * step})
        lines.append(lines[-1] | {"end_of_epoch": True, "rows_digest": "5f3a"})
        lines.append({"step": step, "epoch": epoch, "split": "validation", "loss": 2.5 / step, "accuracy": 0.5})
    lines.append({"step": step, "epoch": epoch, "split": "test", "loss": 0.061, "accuracy": 0.973})
    return lines


def write_run(
    run: Path,
    *,
    lines: list[dict[str, Any]] | None = None,
    result: dict[str, Any] | None = None,
    evaluation: dict[str, np.ndarray] | None = None,
    class_names: list[str] | None = None,
    model: dict[str, np.ndarray] | None = None,
    recipe: str = RECIPE,
    section: str | None = None,
) -> Path:
    rng = np.random.default_rng(0)
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe)
    (run / "environment.json").write_text(json.dumps({"versions": {"torch": "2.11.0"}, "world_size": 2, "seed": 0}))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (metrics() if lines is None else lines))
    )
    default = {
        "status": "finished",
        "metrics": {"test/loss": 0.061, "test/accuracy": 0.973, "validation/loss": 0.0625, "train/loss": 0.05},
        "best": {"metric": "validation/loss", "value": 0.0625, "epoch": 3, "step": 40},
        "checkpoint": "checkpoints/40", "wall_s": 192.4, "time_to_first_step_s": 1.25, "rows_per_s": 9000.0,
        "restarts": 1, "steps": 40, "epochs": 4, "num_workers": 2, "num_parameters": 1_234_567,
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(default if result is None else result))
    if evaluation is None:
        confusion = np.diag(np.arange(20, 30)) + np.eye(10, k=1, dtype=np.int64)
        targets = np.arange(12, dtype=np.int64) % 10
        evaluation = {
            "confusion": confusion.astype(np.int64),
            "example_inputs": rng.integers(0, 256, (12, 1, 8, 8), dtype=np.uint8),
            "example_targets": targets,
            "example_predictions": np.where(np.arange(12) < 8, targets, 9 - targets),
            "example_confidences": np.linspace(0.3, 0.98, 12, dtype=np.float32),
        }
    names = class_names or [f"digit{index}" for index in range(10)]
    metadata = {"class_names": json.dumps(names), "split": "test"} | ({"section": section} if section else {})
    save_file(evaluation, run / "evaluation.safetensors", metadata=metadata)
    weights = model or {
        "layers.10.weight": rng.normal(size=(4, 8, 3, 3)).astype(np.float32),
        "layers.2.weight": rng.normal(size=(8, 1, 3, 3)).astype(np.float32),
        "layers.2.bias": np.zeros(8, np.float32),
    }
    save_file(weights, run / "model/model.safetensors")
    return run


def report(run: Path) -> Page:
    path = write_report(str(run))
    assert path == f"{run}/report.html"
    html = Path(path).read_text()
    assert html.startswith("<!doctype html>")
    page = Page(html)
    assert all(address.startswith("data:image/") for address in page.addresses)  # nothing from elsewhere
    assert "script" not in page.tags
    return page


def test_everything_a_run_holds_is_on_the_page(tmp_path: Path):
    page = report(write_run(tmp_path / "run"))
    assert {"Curves", "Confusion", "Predictions", "Learned filters", "Recipe", "Environment"} <= set(page.headings)
    assert {"loss", "accuracy", "learning rate", "grad norm", "rows per second"} <= set(page.headings)
    assert "Not on this page" not in page.headings
    for words in (
        "digits-cnn finished cnn on digits, classification",
        "test accuracy 97.30 % test loss 0.061",
        "parameters 1 234 567",
        "duration 3 min 12 s",
        "best validation loss 0.0625, epoch 4",
        "channels: [8]",
        "versions.torch 2.11.0",
        "(8 x 1 x 3 x 3)",
    ):
        assert words in page.words
    assert "loss by epoch: train from 0.2 to 0.05; validation from 0.25 to 0.0625; test 0.061" in page.alternatives
    assert page.alternatives.count("8 filters of layers.2.weight") == 1
    assert sum(alternative.startswith("true digit") for alternative in page.alternatives) == 12


def test_wrong_predictions_come_most_confident_first(tmp_path: Path):
    page = report(write_run(tmp_path / "run"))
    assert [a for a in page.alternatives if a.startswith("true ")][:2] == [
        "true digit1, predicted digit8",
        "true digit0, predicted digit9",
    ]


def test_confusions_are_counted_by_row(tmp_path: Path):
    confusion = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])  # the last class never occurs
    page = report(write_run(tmp_path / "run", evaluation={"confusion": confusion}, class_names=["cat", "dog", "owl"]))
    assert "cat 100.0 % 80.0 % 10" in page.words
    assert "dog 71.4 % 100.0 % 5" in page.words
    assert "owl - - 0" in page.words
    assert "Most often confused true predicted rows of the class cat dog 2 20.0 %" in page.words
    assert "The examples: the run kept none." in page.words


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "metrics.jsonl", "result.json",
                                  "evaluation.safetensors", "model/model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut"])
def test_a_missing_or_broken_file_costs_only_its_own_section(tmp_path: Path, name: str, damage: str):
    run = write_run(tmp_path / "run")
    content = (run / name).read_bytes()
    if damage == "missing":
        (run / name).unlink()
    else:
        new = {"empty": b"", "garbage": b"\xff{]\n: [" * 40, "cut": content[: len(content) * 2 // 3]}[damage]
        (run / name).write_bytes(new)
    page = report(run)
    sections = {"recipe.yaml": "Recipe", "environment.json": "Environment", "metrics.jsonl": "Curves",
                "result.json": "Final result, as written", "evaluation.safetensors": "Confusion",
                "model/model.safetensors": "Learned filters"}  # fmt: skip
    assert set(sections.values()) - {sections[name]} <= set(page.headings)
    if damage == "missing":
        assert sections[name] not in page.headings
    elif damage == "garbage":
        assert name in page.words.partition("Not on this page")[2]


def test_a_run_that_has_only_begun(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    page = report(tmp_path)
    assert "unfinished" in page.words
    assert "The curves: metrics.jsonl holds no finite value." in page.words
    assert "The predictions: the run has no evaluation.safetensors." in page.words


def test_a_failed_run_shows_its_error(tmp_path: Path):
    error = "NonFiniteError: loss is nan at step 12\n  <b>lr</b> = 10"
    run = write_run(tmp_path / "run", result={"status": "failed", "metrics": {}, "best": None, "error": error})
    for name in ("evaluation.safetensors", "model/model.safetensors"):
        (run / name).unlink()
    page = report(run)
    assert "The run failed" in page.headings
    assert "loss is nan at step 12" in page.words
    assert "<b>lr</b> = 10" in page.words
    assert "Curves" in page.headings


def test_values_that_are_not_finite_leave_gaps(tmp_path: Path):
    lines = metrics()
    lines[3]["loss"] = None
    lines[7]["loss"] = float("nan")  # json writes NaN
    lines[11]["loss"] = 10**400
    lines += [{"step": 41, "split": "train", "only_nan": None}]
    run = write_run(tmp_path / "run", lines=lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 42, "split": "tra')  # killed while writing
    page = report(run)
    assert "3 not finite" in page.words
    assert "only nan" not in page.headings
    assert "Lines of metrics.jsonl that cannot be read: 1." in page.words


def test_a_step_repeated_after_a_restart_counts_once(tmp_path: Path):
    lines = [{"step": step, "split": "train", "loss": loss} for step, loss in [(1, 5.0), (2, 9.0), (2, 4.0), (3, 3.0)]]
    page = report(write_run(tmp_path / "run", lines=lines))
    assert "loss by step: train from 5 to 3" in page.alternatives
    assert "train, step 2: 4" in page.words
    assert "train, step 2: 9" not in page.words


@pytest.mark.parametrize("lines", [metrics(1), metrics(1)[:1], metrics(1)[-1:], metrics(300)])
def test_few_and_many_lines(tmp_path: Path, lines: list[dict[str, Any]]):
    run = write_run(tmp_path / "run", lines=lines)
    assert "Curves" in report(run).headings
    assert (run / "report.html").stat().st_size < 200_000


@pytest.mark.parametrize(
    "values", [[1e-12, 1e12], [5.0, 5.0], [0.0, 0.0], [-3e9, 1e-9], [1e-320, 3e-320], [0.99999, 1.0]]
)
def test_any_range_of_values_can_be_drawn(tmp_path: Path, values: list[float]):
    lines = [{"step": step, "split": "train", "loss": value, "score": -value} for step, value in enumerate(values)]
    page = report(write_run(tmp_path / "run", lines=lines))
    assert {"loss", "score"} <= set(page.headings)
    assert "nan" not in page.words


@pytest.mark.parametrize("num_classes", [1, 2, 30, 31, 51, 1000, 1500])
def test_any_number_of_classes(tmp_path: Path, num_classes: int):
    confusion = np.eye(num_classes, dtype=np.int64) * 9
    confusion[0, -1] += 1
    page = report(write_run(tmp_path / "run", evaluation={"confusion": confusion}, class_names=["a"] * num_classes))
    assert ("Confusion matrix" in page.alternatives) == (num_classes <= 30)
    assert any(a.startswith(f"Confusion of {num_classes} classes") for a in page.alternatives) == (num_classes > 30)
    assert ("Each class" in page.words) == (num_classes <= 50)
    assert "Not on this page" in page.headings  # the examples only
    assert "cannot be read" not in page.words


def test_names_are_shown_not_run(tmp_path: Path):
    evil = "<script>alert('x')</script>\"'&\ud800"
    lines = [{"step": 1, "split": evil, evil: 0.5, "loss": 1.0}]
    run = write_run(
        tmp_path / "run",
        lines=lines,
        class_names=[evil] * 10,
        recipe=f"name: {json.dumps(evil[:-1])}\nmodel: {{kind: {json.dumps(evil[:-1])}}}\ndata: {{kind: d}}\n",
        result={"status": evil, "metrics": {f"test/{evil}": 1.0}, "best": {"metric": evil}, "error": evil, evil: evil},
        model={evil[:-1] + "weight": np.ones((2, 1, 3, 3), np.float32)},
    )
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    page = report(run)  # refuses script tags
    assert "cannot be read" not in page.words
    assert page.words.count("<script>alert('x')</script>\"'&") > 20


def test_recipes_cannot_run_code(tmp_path: Path):
    run = write_run(tmp_path / "run", recipe=f"name: !!python/object/apply:os.mkdir ['{tmp_path}/hacked']\n")
    page = report(run)
    assert "The recipe: recipe.yaml cannot be read (ConstructorError" in page.words
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("shape", [(6, 3, 32, 32), (6, 3, 200, 300), (6, 5, 9, 7), (6, 1, 28, 28)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_pictures_of_any_size_and_kind(tmp_path: Path, shape: tuple[int, ...], kind: type):
    inputs = np.random.default_rng(0).normal(size=shape) * 3
    labels = {key: np.arange(6) % 2 for key in ("example_targets", "example_predictions")}
    dense = np.ones((100, int(np.prod(shape[1:]))), np.float32)
    run = write_run(tmp_path / "run", evaluation={"example_inputs": inputs.astype(kind), **labels}, model={"w": dense})
    page = report(run)
    assert sum(address.startswith("data:image/") for address in page.addresses) == 6 + 64
    assert "64 of 100 filters" in page.words
    assert "Confusion" not in page.headings


def test_rows_that_are_no_pictures_have_no_pictures(tmp_path: Path):
    labels = {key: np.arange(6) % 2 for key in ("example_targets", "example_predictions")}
    inputs = np.ones((6, 13), np.float32)
    run = write_run(tmp_path / "run", evaluation={"example_inputs": inputs, **labels}, model={"w": np.ones((4, 13))})
    page = report(run)
    assert page.addresses == []
    assert "Right" in page.headings
    assert "The learned filters: no layer of this model looks at pictures." in page.words


def test_weights_in_half_precision_are_read(tmp_path: Path):
    run = write_run(tmp_path / "run")
    content = np.array([[[[1.0, -1.0], [0.5, 0.0]]]], np.float32).view(np.uint32) >> 16  # bfloat16, unknown to NumPy
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1, 1, 2, 2], "data_offsets": [0, 8]}}).encode()
    data = len(header).to_bytes(8, "little") + header + content.astype(np.uint16).tobytes()
    (run / "model/model.safetensors").write_bytes(data)
    page = report(run)
    assert "1 filter of w" in page.alternatives
    png = base64.b64decode(page.addresses[-1].partition(",")[2])
    assert np.asarray(Image.open(io.BytesIO(png)))[..., 3].tolist() == [[255, 255], [127, 0]]


def test_reconstructions_are_no_scatter(tmp_path: Path):
    images = np.zeros((4, 1, 8, 8), np.float32)
    evaluation = {f"example_{name}": images for name in ("inputs", "targets", "predictions")}
    page = report(write_run(tmp_path / "run", evaluation=evaluation))
    assert "The examples: predictions of shape (4, 1, 8, 8) are neither classes nor numbers." in page.words
    assert "Predicted against true" not in page.headings


def test_filters_of_the_encoder_come_before_those_of_the_decoder(tmp_path: Path):
    model = {
        "decoder.0.weight": np.ones((3, 1, 3, 3), np.float32),
        "encoder.0.weight": np.ones((5, 1, 3, 3), np.float32),
    }
    assert "5 filters of encoder.0.weight" in report(write_run(tmp_path / "run", model=model)).alternatives


def test_a_regression_is_drawn_against_the_truth(tmp_path: Path):
    truth = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    evaluation = {"example_targets": truth, "example_predictions": truth + np.float32(0.25)}
    page = report(write_run(tmp_path / "run", evaluation=evaluation))
    assert "Predicted against true" in page.headings
    alternatives = [a for a in page.alternatives if a.startswith("output")]
    assert alternatives[1] == "output 2: predicted against true for 20 rows; mean absolute error 0.25"


@pytest.mark.parametrize("named", [True, False])  # earlier versions wrote no name
@pytest.mark.parametrize("objective", [ClassificationSpec(), RegressionSpec()], ids=lambda spec: spec.kind)
def test_what_an_objective_keeps_is_shown_by_its_section(tmp_path: Path, objective: SupervisedSpec, named: bool):
    classes = isinstance(objective, ClassificationSpec)
    column = {"kind": "label", "size": 3} if classes else {"kind": "numbers", "size": 2}
    signature = Signature(columns={"input": {"kind": "image", "shape": (1, 4, 4)}, "target": column})
    evidence = objective.build(signature).evidence(signature)
    assert evidence is not None
    images = torch.zeros(6, 1, 4, 4)
    target = torch.tensor([0, 1, 2, 0, 1, 2]) if classes else torch.ones(6, 2)
    batch = Batch({"input": images, "target": target}, Place.of(6), lambda: torch.arange(6), {"input": images})
    evidence.add(batch, torch.eye(3)[[0, 1, 1, 0, 1, 1]] if classes else torch.zeros(6, 2))
    kept = {name: tensor.numpy() for name, tensor in evidence.tensors(only_here, torch.device("cpu")).items()}
    section = evidence.section if named else None
    page = report(write_run(tmp_path / "run", evaluation=kept, class_names=["a", "b", "c"], section=section))
    assert ("Confusion" in page.headings) == ("Predictions" in page.headings) == classes
    assert ("Predicted against true" in page.headings) == (not classes)
    assert page.alternatives.count("true c, predicted b") == (2 if classes else 0)
    assert "Not on this page" not in page.headings


def test_evidence_that_nothing_here_shows(tmp_path: Path):
    page = report(write_run(tmp_path / "run", section="sentences"))
    assert "The predictions: the report has no section sentences." in page.words
    assert {"Curves", "Learned filters"} <= set(page.headings)
    assert "Confusion" not in page.headings


def test_broken_names_of_classes_cost_only_the_predictions(tmp_path: Path):
    run = write_run(tmp_path / "run")
    confusion = {"confusion": np.eye(2, dtype=np.int64)}
    save_file(confusion, run / "evaluation.safetensors", metadata={"class_names": "[1,", "section": "classes"})
    page = report(run)
    assert {"Curves", "Learned filters"} <= set(page.headings)
    assert "The predictions: evaluation.safetensors cannot be read (JSONDecodeError" in page.words


def test_sections_have_names_and_templates_of_their_own():
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    folder = Path(sections.__file__).parent
    assert {section.template for section in SECTIONS} <= {path.name for path in folder.glob("*.html")}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_metrics_that_share_a_chart_have_labels_and_colours(kind: str):
    shared: dict[str, list[str]] = {}
    for metric in OBJECTIVES[kind].known_metrics():
        if metric.together:
            shared.setdefault(metric.together, []).append(metric.label)
    for labels in shared.values():
        assert all(labels)
        assert len(set(labels)) == len(labels) <= len(charts.COLOURS)


def test_metrics_are_named_and_counted_as_declared():
    assert charts.words("test/frechet_distance") == "test Frechet distance"
    assert charts.words("l1") == "L1"
    assert charts.words("validation/top_5_accuracy") == "validation top 5 accuracy"  # nobody declares it
    assert charts.words("rows_per_s") == "rows per second"
    assert charts.figure("test/label_agreement", 0.5) == charts.figure("anything_accuracy", 0.5) == "50.00\u202f%"
    assert charts.figure("accuracy", 7.0) == "7"
    assert charts.figure("loss", 0.5) == "0.5"
    known = set(METRICS)
    assert {metric.floor_of for metric in METRICS.values()} - {""} <= known


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent: no such directory; name the directory of a run"):
        write_report(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"not a run \(it holds no recipe.yaml.*name the directory given to --run"):
        write_report(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: not a folder that can be read"):
        write_report(str(tmp_path / "file"))
    write_run(tmp_path / "trial-1")
    with pytest.raises(UserError, match="name one of the runs in it: trial-1"):
        write_report(str(tmp_path))


def test_a_uri_is_a_run_too(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert write_report(f"file://{run}") == f"file://{run}/report.html"
    assert (run / "report.html").exists()


def test_the_same_run_gives_the_same_page(tmp_path: Path):
    run = write_run(tmp_path / "run")
    first = Path(write_report(str(run))).read_bytes()
    assert Path(write_report(str(run))).read_bytes() == first


def test_neither_ray_nor_matplotlib_is_imported(tmp_path: Path):
    run = write_run(tmp_path / "run")
    code = (
        "import sys; from jobs.report import write_report; write_report(sys.argv[1]);"
        "print({'matplotlib', 'ray'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


def test_what_only_the_test_measures_has_no_curve():
    lines = [
        {"step": 1, "epoch": 0, "split": "train", "loss": 1.0, "end_of_epoch": True},
        {"step": 1, "epoch": 0, "split": "test", "loss": 1.0, "macro_f1": 0.5},
    ]
    assert [chart.title for chart in metric_charts(lines, None)] == ["loss"]
