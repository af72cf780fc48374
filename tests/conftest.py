"""One thread for the tests' arithmetic, before anything imports torch.

The models are so small that a second thread only waits: on two busy cores tests/decoding took over eight minutes with
two threads and two with one. Results do not depend on how many cores a machine has, either.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
