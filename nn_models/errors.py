"""The one exception that means: the user must change something (exit code 2 on the command line)."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A problem that only the user can mend; its message names the path, the value and the fix."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"did you mean X?"` when a known word is close, else the list of the known words."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(words)}"
