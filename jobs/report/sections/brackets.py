"""Brackets: what the pages of parsers share: F1 beside trees that nobody has learned, and what is right, by kind."""

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from jobs.report.files import is_number, mapping
from jobs.report.sections.section import Run

F1 = "bracket_f1"
FIGURES = (F1, "loss")
Range = tuple[int, int | None]  # from and to; None for all behind


def percent(share: float) -> str:
    """For people."""
    return f"{100 * share:.1f}\u202f%"


def f1_of(run: Run, split: str, names: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What each is called, and its F1: of those (prefix of the metric, words) that the run has."""
    metrics = mapping(run.result.get("metrics"))
    told = [(words, metrics.get(f"{split}/{prefix}{F1}")) for prefix, words in names]
    return [(words, percent(value)) for words, value in told if is_number(value)]


def summed(
    counts: NDArray[Any], ranges: Sequence[Range], behind: str, *, begin: int = 0
) -> Iterator[tuple[str, list[int]]]:
    """Of counts (kinds, n), of which the first is kind `begin`: what each range is called, and its sums.

    The last range is called such as "6 or `behind`".
    """
    for first, last in ranges:
        name = str(first) if last == first else f"{first} or {behind}" if last is None else f"{first} to {last}"
        yield name, counts[first - begin : None if last is None else last + 1 - begin].sum(0).tolist()
