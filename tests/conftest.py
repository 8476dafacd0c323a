"""What all tests share: a cache of prepared data that is theirs alone."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The session's $MANTA_CACHE, for subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MANTA_CACHE", str(folder))
        yield folder
