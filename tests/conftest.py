"""What all tests share: a cache of prepared data that is theirs alone."""

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The session's $MANTA_CACHE, for subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MANTA_CACHE", str(folder))
        yield folder
