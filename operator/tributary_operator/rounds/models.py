"""The model that a round starts from or a release serves, checked before anything is spent."""

from __future__ import annotations

import json
import math
from typing import Any

from tributary_api.records import FileDigest, OutcomeKind, RoundOutcome
from tributary_api.round import FederatedRound, Method
from tributary_api.shared import ModelRef, ModelSource
from tributary_operator.kinds import ROUND
from tributary_operator.reconciler import World
from tributary_operator.rounds.observed import BaseModel
from tributary_store import bundle
from tributary_store.errors import AccessDenied, ObjectDamaged, ObjectMissing, StoreError
from tributary_store.objectstore import ObjectStore
from tributary_store.tensors import TensorHeader, read_header

CONFIG_FILE = "config.json"


async def resolve(world: World, namespace: str, source: ModelSource) -> BaseModel:
    """The model that a spec of this namespace names, by URI and digest or by the round that made it."""
    if source.round_ref is not None:
        found = await _of_round(world, namespace, source.round_ref.name)
    elif source.uri is not None and source.digest is not None:
        found = BaseModel(ModelRef(uri=source.uri, digest=source.digest))
    else:
        found = BaseModel(reason="ModelMissing", message="the spec names no model", is_stalled=True)
    return found if found.ref is None else await _checked(world, found.ref)


async def _of_round(world: World, namespace: str, name: str) -> BaseModel:
    raw = world.cached(ROUND, namespace, name) or await world.cluster.get(ROUND, namespace, name)
    if raw is None:
        return BaseModel(
            reason="BaseRoundMissing", message=f"there is no round {name}: create it", is_stalled=True
        )
    run_key = FederatedRound.model_validate(raw).run_key
    outcome = await world.records.find(world.settings.layout.outcome(run_key), RoundOutcome)
    if outcome is None:
        return BaseModel(reason="BaseRoundPending", message=f"round {name} is not complete yet")
    if outcome.outcome is OutcomeKind.FAILED or outcome.model is None:
        message = (
            f"round {name} failed ({outcome.reason}) and has no model: create a round from another model"
        )
        return BaseModel(reason="BaseRoundFailed", message=message, is_stalled=True)
    return BaseModel(outcome.model)


async def _checked(world: World, ref: ModelRef) -> BaseModel:
    """The digest of the bundle's files must be the one asked for; workers check every byte once more."""
    try:
        await world.records.in_thread(bundle.read_manifest, world.records.store, ref)
    except ObjectMissing as error:
        return BaseModel(reason="ModelMissing", message=str(error), is_stalled=True)
    except ObjectDamaged as error:
        return BaseModel(reason="ModelDigestMismatch", message=str(error), is_stalled=True)
    except AccessDenied as error:
        return BaseModel(reason="ModelDenied", message=str(error), is_stalled=True)
    return BaseModel(ref)


async def trained_weights(world: World, method: Method, ref: ModelRef) -> int | None:
    """How many weights a round trains, if that can be told: to judge the noise by."""
    try:
        if method.lora is None:
            return await world.records.in_thread(_stored_weights, world.records.store, ref)
        config = await world.records.in_thread(_config, world.records.store, ref)
    except (StoreError, ValueError):
        return None
    return lora_weights(config, method)


def _stored_weights(store: ObjectStore, ref: ModelRef) -> int:
    """Of the whole model, by the headers of its files; tied weights are stored once."""

    def header(file: FileDigest) -> TensorHeader:
        uri = bundle.file_uri(ref, file.path)
        return read_header(uri, file.size, lambda start, length: store.get_range(uri, start, length))

    files = bundle.weight_files(bundle.read_manifest(store, ref))
    return sum(math.prod(info.shape) for file in files for info in header(file).tensors.values())


def _config(store: ObjectStore, ref: ModelRef) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.get(bundle.file_uri(ref, CONFIG_FILE)))
    return found


def _linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of one block, by the last part of its name."""
    if config.get("model_type") == "gpt2":
        h = int(config["n_embd"])
        inner = int(config.get("n_inner") or 4 * h)
        return {"c_attn": (h, 3 * h), "attn.c_proj": (h, h), "c_fc": (h, inner), "mlp.c_proj": (inner, h)}
    if config.get("model_type") in {"llama", "mistral", "qwen2"}:
        h, inner, heads = (
            int(config[k]) for k in ("hidden_size", "intermediate_size", "num_attention_heads")
        )
        head = int(config.get("head_dim") or h // heads)
        keys = int(config.get("num_key_value_heads") or heads) * head
        attention = {
            "q_proj": (h, heads * head),
            "k_proj": (h, keys),
            "v_proj": (h, keys),
            "o_proj": (heads * head, h),
        }
        return {**attention, "gate_proj": (h, inner), "up_proj": (h, inner), "down_proj": (inner, h)}
    return {}


def lora_weights(config: dict[str, Any], method: Method) -> int | None:
    """r·out for each adapted layer with A frozen, else r·(in + out); None for an unknown architecture."""
    linears = _linears(config)
    if method.lora is None or not linears:
        return None
    wanted = method.lora.target_modules
    chosen = [size for name, size in linears.items() if not wanted or name.rsplit(".", 1)[-1] in wanted]
    blocks = int(config.get("n_layer") or config.get("num_hidden_layers") or 0)
    sizes = (out if method.lora.freeze_a else inputs + out for inputs, out in chosen)
    return blocks * method.lora.rank * sum(sizes) or None
