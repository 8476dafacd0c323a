"""The cache of prepared data sets and downloads: $MANTA_CACHE, else ~/.cache/manta."""

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache's directory; it may not exist yet."""
    return Path(os.environ.get("MANTA_CACHE") or Path.home() / ".cache" / "manta").expanduser().absolute()
