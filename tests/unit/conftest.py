"""One thread: the numbers of a test must not depend on the machine's cores."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
