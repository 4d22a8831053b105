"""Flower's own FedAvg on the same objects, as a server of its users would have them in memory.

A child program for Flower's environment, with nothing of ours in it: FLOWER_TASK holds its task as JSON,
AWS_* the credentials. The clients' objects are taken for whole models, which is what Flower exchanges, so
Flower reads no base model and adds nothing to it: it does less than the aggregator that it is compared with.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

TASK_ENV = "FLOWER_TASK"
OUT_OF_MEMORY_CODE = 70
ARRAYS, METRICS, WEIGHT = "arrays", "metrics", "num-examples"


@dataclass(frozen=True, slots=True)
class FlowerTask:
    """Keys of the clients' safetensors files and their numbers of examples; where the mean is written."""

    endpoint: str
    region: str
    bucket: str
    deltas: list[str]
    examples: list[int]
    target: str
    memory_bytes_max: int

    def environment(self) -> dict[str, str]:
        return {TASK_ENV: json.dumps(asdict(self))}


def main() -> None:
    task = FlowerTask(**json.loads(os.environ[TASK_ENV]))
    # Heap and anonymous mappings: where NumPy's arrays lie.
    resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes_max, task.memory_bytes_max))
    try:
        aggregate(task)
    except MemoryError:
        sys.exit(OUT_OF_MEMORY_CODE)


def aggregate(task: FlowerTask) -> None:
    import boto3
    from flwr.serverapp.strategy import FedAvg
    from safetensors.numpy import save

    client = boto3.client("s3", endpoint_url=task.endpoint, region_name=task.region)
    replies = [reply(client, task, n) for n in range(len(task.deltas))]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    if arrays is None:
        sys.exit("Flower took none of the replies")
    model = BytesIO(save({name: array.numpy() for name, array in arrays.items()}))
    client.upload_fileobj(model, task.bucket, task.target)


def reply(client: Any, task: FlowerTask, index: int) -> Any:
    """A client's reply as Flower's server receives it. boto3 fetches the parts of an object in parallel."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from safetensors.numpy import load

    body = BytesIO()
    client.download_fileobj(task.bucket, task.deltas[index], body)
    arrays = ArrayRecord({name: Array(values) for name, values in load(body.getvalue()).items()})
    content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: task.examples[index]})})
    return Message(content=content, metadata=metadata(node=index + 1))


def metadata(node: int) -> Any:
    """What Flower's link would have written on a reply."""
    from flwr.app import Metadata

    return Metadata(
        run_id=1,
        message_id=str(node),
        src_node_id=node,
        dst_node_id=1,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=3600.0,
        message_type="train",
    )


if __name__ == "__main__":
    main()
