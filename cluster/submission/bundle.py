"""Bundle: what of the working directory is uploaded, its size, and manta itself as a wheel.

Those files that Ray's own client uploads, which heeds .gitignore and .rayignore, but for what a job has no use of.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.errors import RunFailed
from cluster.recipe.loading import ENVIRONMENT, RECIPE
from cluster.runtime.limits import size
from cluster.storage import legible
from nn_models.errors import UserError

MIB = 1 << 20
LIMIT_MIB = 100
MOST_MIB = 512  # Ray keeps packages in its GCS and takes none that is larger
MOST_SHOWN = 5
MOST_OF_IT = 0.8  # a folder is shown by what is in it where one thing has so much of its bytes

PACKAGES = ("nn_models", "cluster", "jobs")
LEFT_OUT = (".git", ".hg", ".venv", "venv", "__pycache__", "node_modules", ".ipynb_checkpoints")
MARKS = (  # files that say what a folder is
    ("pyvenv.cfg",),  # a virtual environment
    ("CACHEDIR.TAG",),  # https://bford.info/cachedir: pytest, mypy, ruff, …
    (RECIPE, ENVIRONMENT),  # a run or a sweep
)
NO_PATTERNS = (ValueError, IndexError)  # how Ray's library of patterns tells of some that are none
_SILENT = logging.getLogger(f"{__name__}.ray")
_SILENT.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Bundle:
    """The files of a folder that are uploaded: relative name -> bytes."""

    root: Path
    files: dict[str, int]
    excludes: tuple[str, ...]  # for Ray, as patterns of .gitignore

    @property
    def num_bytes(self) -> int:
        """Of all files; Ray's archive is not compressed."""
        return sum(self.files.values())

    @property
    def has_manta(self) -> bool:
        """Whether the packages are in it, so that the cluster needs none."""
        return all(f"{package}/__init__.py" in self.files for package in PACKAGES[1:])

    def holds(self, path: Path) -> bool:
        """Whether the file, or something in the folder, is uploaded."""
        try:
            name = Path(os.path.normpath(path.absolute())).relative_to(self.root).as_posix()
        except ValueError:
            return False
        return name in self.files or any(file.startswith(f"{name}/") for file in self.files)

    def largest(self, count: int = MOST_SHOWN) -> list[tuple[str, int]]:
        """The largest entries: files, and folders (with a `/`) where their bytes are spread over many."""
        largest = sorted(_entries(self.files), key=lambda entry: -entry[1])[:count]
        return [(name if name.isprintable() else repr(name), num) for name, num in largest]

    def refuse_larger(self, limit_mib: int) -> None:
        """Raise UserError past the limit, naming what is largest."""
        if limit_mib > MOST_MIB:
            raise UserError("--upload-limit", f"{limit_mib} MiB: Ray takes {MOST_MIB} MiB at most", "ask for less")
        if self.num_bytes > limit_mib * MIB:
            told = ", ".join(f"{name} {size(num)}" for name, num in self.largest())
            raise UserError(
                str(self.root),
                f"{size(self.num_bytes)} would be uploaded, more than {limit_mib} MiB; largest: {told}",
                "list in .rayignore what the job has no use of, put data on shared storage, or raise --upload-limit",
            )


def bundle(root: Path, *, without: Sequence[str] = ()) -> Bundle:
    """What is uploaded of the folder, `without` what these patterns of .gitignore match.

    Raises UserError for files that cannot be read, and for patterns that are none.
    """
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # which files Ray takes: no public name

    root = root.absolute()
    files: dict[str, int] = {}
    excludes: list[str] = []

    def left_out(path: Path) -> bool:
        if path == root or not _of_no_use(path):
            return False
        excludes.append("/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", path.relative_to(root).as_posix()))
        return True

    def take(path: Path) -> None:
        if not path.is_file():
            return
        name = path.relative_to(root).as_posix()
        if name != legible(name):
            raise UserError(legible(str(path)), "a name that is not UTF-8", "rename it, or list it in .rayignore")
        if name.splitlines() != [name]:  # no pattern could leave it out, nor a line tell of it
            raise UserError(repr(str(path)), "a name of several lines", "rename it")
        if not os.access(path, os.R_OK):
            raise UserError(str(path), "no permission to read it", "change that, or list it in .rayignore")
        files[name] = path.stat().st_size

    try:
        unwanted = _get_excludes(root, list(without))
    except NO_PATTERNS as error:
        raise UserError("--runtime-env", f"excludes: {error}", "write patterns as in .gitignore") from None
    try:
        _dir_travel(root, [unwanted, left_out], take, include_gitignore=True, logger=_SILENT)
    except NO_PATTERNS as error:
        raise _no_patterns(root, error) from None
    except OSError as error:
        path = str(error.filename or root)
        raise UserError(path, f"cannot be read ({error.strerror})", "change that, or list it in .rayignore") from None
    return Bundle(root, files, tuple(excludes))


def _no_patterns(root: Path, error: Exception) -> UserError:
    """What to raise for an ignore file that cannot be understood: Ray does not say which."""
    from ray._private.runtime_env.packaging import _get_ignore_file

    for name in (".gitignore", ".rayignore"):
        for file in root.rglob(name):
            try:
                _get_ignore_file(file.parent, name)
            except NO_PATTERNS as of_file:
                return UserError(str(file), f"no list of patterns ({of_file})", "mend it, or take it away")
    return UserError(str(root), f"cannot be read ({error})", "look at its .gitignore and .rayignore")


def _of_no_use(path: Path) -> bool:
    if path.name in LEFT_OUT or path.suffix == ".pyc":
        return True
    if not path.is_dir():
        return not path.is_file()  # a link that leads nowhere; a pipe, which Ray would wait for to be written
    if path.is_symlink() and path.resolve() in [above.resolve() for above in path.parents]:
        return True  # a circle
    return any(all((path / name).is_file() for name in names) for names in MARKS)


def _entries(files: dict[str, int], above: str = "") -> Iterator[tuple[str, int]]:
    inside: dict[str, dict[str, int]] = defaultdict(dict)
    for name, num in files.items():
        first, _, rest = name.partition("/")
        inside[first][rest] = num
    for first, of in inside.items():
        total = sum(of.values())
        if "" in of:
            yield f"{above}{first}", total
            continue
        below = list(_entries(of, f"{above}{first}/"))
        one_has_most = max(num for _, num in below) > MOST_OF_IT * total
        yield from below if one_has_most else [(f"{above}{first}/", total)]


# -- manta itself ----------------------------------------------------------------------------------------------------


@contextmanager
def wheel() -> Iterator[Path]:
    """A wheel of this checkout, as a zip file: Ray unpacks it into a folder that Python's path has.

    Installed it would be with all that it depends on, which a cluster has. Raises UserError where manta runs from an
    installation, and RunFailed where it cannot be built.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / "pyproject.toml").is_file():
        raise UserError("--with-manta", f"{checkout} is no checkout of manta", "run `python -m jobs` in one")
    with TemporaryDirectory(prefix="manta-wheel-") as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        for package in PACKAGES:  # building leaves files beside them
            shutil.copytree(checkout / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(checkout / name, source / name)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
        if _setuptools_is_here():
            build.append("--no-build-isolation")  # asks no package index
        same = {"SOURCE_DATE_EPOCH": "315532800"}  # equal content gives equal bytes: uploaded once
        built = subprocess.run(build, env=os.environ | same, capture_output=True, text=True)
        wheels = list(out.glob("*.whl"))
        if built.returncode or not wheels:
            last = (built.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise RunFailed(f"the wheel for --with-manta could not be built: {last}")
        yield wheels[0].rename(wheels[0].with_suffix(".zip"))


def _setuptools_is_here() -> bool:
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77  # as pyproject.toml asks
    except metadata.PackageNotFoundError:
        return False
