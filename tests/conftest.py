"""One thread for the tests' arithmetic and no network, before anything imports torch or the Hub's client.

The models are so small that a second thread only waits: on two busy cores tests/decoding took over eight minutes with
two threads and two with one. What several threads compute in another way is tested with the fixture `threads`.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # `HF_HUB_OFFLINE=0 pytest -m network` for tests that download


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many threads as the parameter says, on however few cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
