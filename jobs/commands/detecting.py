"""What `manta detect` prints."""

from collections.abc import Mapping
from typing import Any

from nn_models.anomaly import AUROC, AVERAGE_PRECISION

WORDS = {
    "precision": "precision",
    "recall": "recall",
    "false_positive_rate": "false positives",
    AUROC.name: AUROC.words,
    AVERAGE_PRECISION.name: AVERAGE_PRECISION.words,
}


def print_found(found: Mapping[str, Any], path: str | None) -> None:
    """The figures of a Detection, with the intervals that they lie in."""
    chosen = "given"
    if found["rate"] is not None:
        chosen = f"for {found['rate']:.3g} of normal rows, by {found['validation_rows']:,} of validation"
    told = {"threshold": f"{found['threshold']:.6g} ({chosen})", "rows": f"{found['rows']:,}"}
    told["above it"] = f"{found['flagged']:,}"
    if "metrics" in found:
        told["anomalies"] = f"{found['anomalies']:,}"
        for name, word in WORDS.items():
            value = found["metrics"].get(name)
            told[word] = "-" if value is None else f"{value:.4f}{_interval(found, name)}"
    else:
        told["figures"] = "none: no row is labelled as an anomaly (--anomaly CLASS says which label is one)"
    if path:
        told["scores"] = path
    for word, value in told.items():
        print(f"{word:22}{value}")


def _interval(found: Mapping[str, Any], name: str) -> str:
    predicted = found.get("predicted", {})
    if name == "recall":
        low, high = found["recall_interval"]
        return f"  (95 % interval {low:.4f} to {high:.4f})"
    if None in (between := predicted.get(name, [None])):
        return ""
    return f"  (predicted from validation: {between[0]:.4f} to {between[1]:.4f}, 95 %)"
