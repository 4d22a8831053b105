"""Serve a model directory in a process of its own: python serve_directory.py DIRECTORY PORT."""

import sys
from pathlib import Path

from tributary_api.shared import TaskKind
from tributary_worker.compression.loading import load_model
from tributary_worker.serving.server import DrainingServer
from tributary_worker.serving.service import Service

directory, port = sys.argv[1:]
server = DrainingServer(
    Service.of("assistant", "r1", 4096),
    lambda: load_model(Path(directory), TaskKind.CAUSAL_LM),
    host="127.0.0.1",
    port=int(port),
    grace_seconds=1,
    finish_seconds=30,
)
server.run()
sys.exit(3 if server.failure else 0)
