from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

# The operator's environment has no torch; it collects these tests when it looks for others.
collect_ignore_glob = [] if find_spec("torch") else ["*"]


@pytest.fixture(scope="session")
def alone():
    """A process group of this process only, as in a training with one pod and one process."""
    import torch

    from tributary_worker import distributed

    torch.set_num_threads(1)
    port = distributed.free_port()
    layout = distributed.RankLayout(0, 0, 1, 1, distributed.LOOPBACK, port)
    os.environ.update(layout.environment)
    with distributed.process_group(layout):
        yield
    for name in layout.environment:
        del os.environ[name]
