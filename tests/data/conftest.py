"""For all tests of the data: shards so small that there are several."""

from collections.abc import Iterator

import pytest

from coral_core.data import plan


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_TOKENS", 200)
        yield
