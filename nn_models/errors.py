"""The one exception that means: the user must change something (exit code 2 on the command line)."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

LONGEST_WORD = 100  # that others are looked for that are like it
LONGEST_MESSAGE = 2000  # as text: some name a value of the user's
ProblemKind = Literal["unknown field", "unknown kind", "not a section"]


class Problem(NamedTuple):
    """One thing that the user must mend; as text, a line `path: message; fix`.

    `kind` says of a path in a recipe that there is no such path, whatever its value, where other code has to know.
    """

    path: str  # in a recipe, a flag of the command line, or a file; empty where there is none
    message: str
    fix: str | None = None  # what to do, or a question such as "did you mean X?"
    kind: ProblemKind | None = None
    names: tuple[str, ...] = ()  # paths in a recipe that the fix may name

    def __str__(self) -> str:
        message = self.message if len(self.message) <= LONGEST_MESSAGE else f"{self.message[:LONGEST_MESSAGE]} …"
        text = f"{self.path}: {message}" if self.path else message
        return f"{text}; {self.fix}" if self.fix else text

    def moved(self, paths: Mapping[str, str]) -> "Problem":
        """The same in a recipe where each of these paths, old -> new, and all below it stand elsewhere."""
        names = tuple(_moved(name, paths) for name in self.names)
        fix = self.fix
        for old, new in zip(self.names, names, strict=True):
            fix = fix and fix.replace(old, new)
        return self._replace(path=_moved(self.path, paths), fix=fix, names=names)


class UserError(Exception):
    """Problems that only the user can mend, most often one; as text, a line each."""

    problems: tuple[Problem, ...]

    def __init__(
        self,
        path: str,
        message: str,
        fix: str | None = None,
        *,
        kind: ProblemKind | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(path, message, fix)  # pickle makes it anew from these, and then restores `problems`
        self.problems = (Problem(path, message, fix, kind, names),)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> "UserError":
        """One error for all of these, each of them told once."""
        told = tuple(dict.fromkeys(problems))
        error = cls(told[0].path, told[0].message, told[0].fix)
        error.problems = told
        return error

    @classmethod
    def from_plain(cls, problems: Iterable[Mapping[str, Any]]) -> "UserError":
        """What `plain` was made from."""
        return cls.of(Problem(**{**problem, "names": tuple(problem["names"])}) for problem in problems)

    def plain(self) -> list[dict[str, Any]]:
        """The problems as mappings that JSON can hold."""
        return [problem._asdict() for problem in self.problems]

    @property
    def path(self) -> str:
        """Of the first problem."""
        return self.problems[0].path

    @property
    def message(self) -> str:
        """Of the first problem."""
        return self.problems[0].message

    @property
    def fix(self) -> str | None:
        """Of the first problem."""
        return self.problems[0].fix

    def moved(self, paths: Mapping[str, str]) -> "UserError":
        """The same problems in a recipe where each of these paths, old -> new, and all below it stand elsewhere."""
        return UserError.of(problem.moved(paths) for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"did you mean X?"` when a known word is close, else the list of the known words."""
    words = sorted(known)
    word = word[:LONGEST_WORD]  # comparing takes time
    found = closest(word, words)
    return f"did you mean {found}?" if found else f"known: {', '.join(words)}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like this one; None where none is like it."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)), None)


def is_within(path: str, section: str) -> bool:
    """Whether a dotted path is that of the section, or below it."""
    return path == section or path.startswith(f"{section}.")


def _moved(path: str, paths: Mapping[str, str]) -> str:
    for old, new in paths.items():
        if is_within(path, old):
            return new + path[len(old) :]
    return path
