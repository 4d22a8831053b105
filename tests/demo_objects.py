"""A client and a round of the demo, as the API server gives them."""

from __future__ import annotations

from typing import Any

CLIENT: dict[str, Any] = {
    "metadata": {"name": "docstrings", "namespace": "algebra"},
    "spec": {
        "data": {"name": "docstrings", "uri": "s3://algebra-data/private/", "numExamples": 10},
        "store": {},
        "consent": {"hubs": [{"namespace": "hub"}], "expires": "2036-12-31T00:00:00Z"},
        "privacy": {
            "budget": {"epsilon": "20", "delta": "1e-5"},
            "maxRoundEpsilon": "8",
            "ledgerUri": "s3://tributary/ledger/algebra/docstrings/",
        },
        "worker": {"allowedImages": ["localhost/worker@sha256:" + "0" * 64]},
    },
    "status": {"privacy": {"spentEpsilon": "4.2", "remainingEpsilon": "15.8"}},
}
ROUND: dict[str, Any] = {
    "metadata": {"name": "round-1", "namespace": "hub"},
    "spec": {
        "baseModel": {"roundRef": {"name": "round-0"}},
        "clients": {},
        "method": {"lora": {}},
        "training": {"maxSteps": 10, "expectedBatchSize": 4, "learningRate": "0.1"},
        "privacy": {"epsilon": "8", "delta": "1e-5"},
    },
}
