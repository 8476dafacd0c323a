"""The cache of prepared data sets and downloads: $MANTA_CACHE, else ~/.cache/manta."""

import os
from pathlib import Path

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
