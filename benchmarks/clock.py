"""A clock that neighbours on the machine do not slow down."""

import time

import torch


def busy_s() -> float:
    """Seconds: on a GPU the wall clock's, once it has done its work; on a CPU what this process computed, per thread.

    A training keeps all of its threads busy, so that on a machine of its own the two agree.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()
