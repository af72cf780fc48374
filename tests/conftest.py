"""One thread for the tests' arithmetic, before anything imports torch.

The models are so small that a second thread only waits: on two busy cores tests/decoding took over eight minutes with
two threads and two with one. What several threads compute in another way is tested with the fixture `threads`.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many threads as the parameter says, on however few cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
