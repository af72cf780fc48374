"""Files of tensors."""

import os

import pytest
import torch

from coral_core.tensors import write_tensors


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_tensors_are_as_readable_as_the_process_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors({"one": torch.ones(1)}, tmp_path / "a.safetensors")
        (tmp_path / "text").touch()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o640}
