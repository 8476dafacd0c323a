"""What all tests share: a cache of prepared data that is theirs alone."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("no deadline")


RAY = Path(__file__).parent / "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark and put last what uses the session's Ray: once it has started, it is this process's until the end."""
    for item in items:
        if RAY in item.path.parents:
            item.add_marker(pytest.mark.ray)
    items.sort(key=lambda item: RAY in item.path.parents)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The session's $MANTA_CACHE, for subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MANTA_CACHE", str(folder))
        yield folder
