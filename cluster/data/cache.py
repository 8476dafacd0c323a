"""The cache of prepared data sets and downloads: $MANTA_CACHE, else ~/.cache/manta."""

import os
import shutil
from pathlib import Path

from cluster.data.manifest import MANIFEST
from nn_models.errors import UserError


def cache_root() -> Path:
    """The cache's directory, made where it is not there yet. Raises UserError where it cannot be written."""
    place = Path(os.environ.get("MANTA_CACHE") or Path.home() / ".cache" / "manta")
    try:
        place = place.expanduser().absolute()
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "MANTA_CACHE", f"{place} cannot be written ({error})", "set it to a writable directory"
        ) from None
    return place


def publish(unfinished: Path, folder: Path) -> None:
    """Give a data set that is all there its name in the cache, where no other process has just done so."""
    if folder.exists() and not (folder / MANIFEST).exists():  # what is left of a set that somebody deleted
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / MANIFEST).exists():  # another process was not first: this is a real failure
            raise
