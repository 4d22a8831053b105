"""One rank of a two-process training, for test_ranks.py: says what the optimizers of all ranks get."""

from __future__ import annotations

import json
import os
import sys

import private_engines as engines
import torch

from tributary_api.shared import TaskKind
from tributary_worker import distributed
from tributary_worker.objectives import synthetic_batch
from tributary_worker.privacy.engine import PrivateEngine
from tributary_worker.privacy.errors import PrivacyError
from tributary_worker.privacy.selftest import run_self_test


class Averaging(PrivateEngine):
    """A defect: the mean over ranks instead of their sum, as if DeepSpeed's average had been forgotten."""

    def record(self, clipped, step):
        return super().record(clipped / self.world_size, step)


def found(method: str, stage: int, micro_batch_size: int) -> dict[str, object]:
    model = engines.MODELS[method]()
    private = engines.engine(model, zero_stage=stage, micro_batch_size=micro_batch_size)
    gradient = engines.received(private, engines.data_set(), 0)
    figures = run_self_test(private, _batch(model, private))
    for step in range(2):
        private.train_step(step, lambda indices: engines.load(engines.data_set(), list(indices)))
    weights = engines.weights(private)
    return {
        "gradient": gradient.tolist(),
        "weights": weights.tolist(),
        "owned": private.owned,
        "planted": figures.planted_record_ratio,
    }


def averaging_is_found() -> bool:
    model = engines.adapted_gpt2()
    private = engines.engine(model, kind=Averaging)
    try:
        run_self_test(private, _batch(model, private))
    except PrivacyError as error:
        return "planted record" in str(error)
    return False


def _batch(model, private):
    return synthetic_batch(
        TaskKind.CAUSAL_LM, model.config, private.micro_batch_size, engines.LENGTH, private.device
    )


def main() -> None:
    torch.set_num_threads(1)
    with distributed.process_group(distributed.RankLayout.from_environment(os.environ)):
        results = [found(*case) for case in json.loads(sys.argv[1])]
        print(json.dumps({"results": results, "averaging_is_found": averaging_is_found()}))


main()
