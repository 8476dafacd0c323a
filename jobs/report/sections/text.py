"""Text: what a language model writes, what each token of a test costs it, its bits and its perplexity."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jobs.report.charts import metric_charts, number
from jobs.report.files import AbsentError, is_number, left_out, mapping
from jobs.report.sections.section import EVALUATION, Run, Section
from jobs.report.texts import Words

BITS = "bits_per_token"
MOST_BITS = 500  # of a token: 2 to the power of more would not be told apart
STRONG = 8.0  # bits from which on a token is of the full colour, where nobody knows how many tokens there are


class Written(NamedTuple):
    """A text and the temperature it was drawn at."""

    temperature: str
    text: str


class Token(NamedTuple):
    """A token of the test: its text, what it costs, and how strong its colour is (0 to 1)."""

    text: str
    bits: str
    strength: float


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors, metrics = run.evaluation, mapping(run.result.get("metrics"))
    words, best = Words.of(tensors), mapping(run.result.get("best"))
    page: dict[str, Any] = {
        "split": tensors.metadata.get("split", "test"),
        "token": words.tokens,
        "size": len(words.names) or None,
        "figures": _figures(metrics, words.tokens),
        "charts": metric_charts([_perplexed(record) for record in run.records], best.get("step")),
        "full": math.log2(len(words.names)) if len(words.names) > 1 else STRONG,
        "written": [],
        "passage": [],
    }
    with left_out(run.notes, "The written text", file=tensors.name):
        if "text/written" not in tensors:
            raise AbsentError("the run kept none")
        drawn = zip(tensors["text/temperatures"].tolist(), tensors["text/written"].tolist(), strict=True)
        page["written"] = [Written(f"{temperature:.2g}", words.text(row).strip("\n")) for temperature, row in drawn]
    if "text/bits" in tensors:
        with left_out(run.notes, "The passage of the test", file=tensors.name):
            rows = zip(tensors["text/following"].tolist(), tensors["text/bits"].tolist(), strict=True)
            page["passage"] = [
                [
                    Token(text.replace("\n", "\u23ce"), f"{bits:.2f}", min(1.0, max(bits, 0.0) / page["full"]))
                    for text, bits in zip(words.pieces(row), costs, strict=True)
                ]
                for row, costs in rows
            ]
    return page


def _perplexed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics with the perplexity alone, 2 to the bits of a token, where it tells these."""
    kept = {name: record[name] for name in ("step", "epoch", "split", "end_of_epoch") if name in record}
    bits = record.get(BITS)
    return {**kept, "perplexity": 2**bits} if is_number(bits) and bits < MOST_BITS else kept


def _figures(metrics: Mapping[str, Any], token: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """Split, bits, nats and perplexity of a token."""
    rows = []
    for split in ("train", "validation", "test"):
        bits = metrics.get(f"{split}/{BITS}")
        if is_number(bits) and bits < MOST_BITS:
            rows.append((split, number(bits), number(bits * math.log(2)), number(float(2**bits))))
    return rows


SECTION = Section(
    name="text",
    template="text.html",
    read=_read,
    title="The language model",
    file=EVALUATION,
    figures=(BITS, "accuracy", "loss"),
)
