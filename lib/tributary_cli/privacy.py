"""`tributary privacy`: what an owner checks without trusting the hub: receipts, ledgers, and keys to pin."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from tributary_accounting import accountant, ledger, receipts
from tributary_accounting.mechanism import batch_cap
from tributary_accounting.signatures import SEED_BYTES, SignatureRefused, SigningKey, verify
from tributary_api.base import ApiModel
from tributary_api.records import DeltaManifest, LedgerEntry, MechanismSpec, PlannedClient, RoundPlan
from tributary_store.digests import digest_of_file
from tributary_store.errors import ObjectDamaged, ObjectMissing, StoreError
from tributary_store.keys import ledger_entry
from tributary_store.objectstore import ObjectStore

Open = Callable[[], ObjectStore]
"""The store, connected to only when a URI asks for it."""
S3 = "s3://"
STDIN = "-"
EPSILON_TOLERANCE = 1e-3
"""Relative; the accountant's own discretization moves ε by less."""
PLANTED_RATIO_MAX = 1.001
NOISE_RATIO_TOLERANCE = 0.05
"""The self-test's own bounds are tighter; outside of these nobody could have passed it."""
RUN_KEY_SHOWN = 12

RecordT = TypeVar("RecordT", bound=ApiModel)


class ReceiptUnreadable(StoreError):
    """What was given is not the record that is asked for."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    result: Literal["ok", "FAILED", "-"]
    detail: str


def verify_receipt(arguments: argparse.Namespace, open_store: Open) -> int:
    """Print what a receipt states and whether it is true; 1 if any of it is not."""
    manifest = _record(arguments.manifest, DeltaManifest, open_store)
    print("\n".join(_statement(manifest)))
    checks = list(_checks(manifest, arguments, open_store))
    _print_table([(c.result, c.name, c.detail) for c in checks])
    return 1 if any(check.result == "FAILED" for check in checks) else 0


def show_ledger(arguments: argparse.Namespace, open_store: Open) -> int:
    """Print a ledger, verified, and what it adds up to."""
    store = open_store()
    first = _first_entry(store, arguments.ledger)
    if first is None:
        print(f"{arguments.ledger} is empty: nothing was ever reserved")
        return 0
    try:
        chain = ledger.read(store, arguments.ledger, first.data_set)
    except ledger.LedgerBroken as error:
        print(f"FAILED  {error}")
        return 1
    header = ("n", "recorded", "kind", "run", "hub", "epsilon's mechanism")
    _print_table([header, *(_row(entry) for entry in chain.entries)])
    print("\n".join(_balance(chain, arguments.delta or float(first.delta), arguments.epsilon)))
    return 0


def print_key(arguments: argparse.Namespace, _: Open) -> int:
    """Print the public key of an owner's receipts, for spec.privacy.receiptKey."""
    source = arguments.noise_key
    secret = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    if len(secret) != SEED_BYTES:
        # The Secret's text would give a key, too, and nobody would sign with it.
        raise ReceiptUnreadable(
            f"{source} holds {len(secret)} bytes, not {SEED_BYTES}: decode the Secret's entry with base64 -d"
        )
    print(SigningKey.of_tenant(secret).public)
    return 0


def _statement(manifest: DeltaManifest) -> Iterator[str]:
    receipt, m = manifest.receipt, manifest.receipt.mechanism
    yield f"client     {manifest.client}, run {manifest.run_key}"
    yield f"grant      {receipt.grant_digest}, base model {manifest.base_model_digest}"
    yield f"mechanism  {_mechanism(m)}, clipping norm {m.max_grad_norm:g}"
    yield f"relation   {receipt.neighboring_relation}, sampling {receipt.sampling}"
    yield f"image      {receipt.image or 'not stated'}"
    yield "versions   " + ", ".join(f"{name} {text}" for name, text in sorted(receipt.versions.items()))


def _mechanism(m: MechanismSpec) -> str:
    batch = f"batch {m.expected_batch_size} (at most {m.batch_cap})"
    return f"N {m.num_examples}, {batch}, {m.steps} steps, sigma {m.noise_multiplier:.6g}"


def _checks(manifest: DeltaManifest, arguments: argparse.Namespace, open_store: Open) -> Iterator[Check]:
    yield _signature(manifest, arguments.receipt_key)
    yield from _epsilon(manifest)
    yield _self_test(manifest)
    yield _delta_file(manifest, arguments, open_store)
    yield _grant(manifest, arguments, open_store)


def _signature(manifest: DeltaManifest, trusted: str | None) -> Check:
    try:
        key = verify(manifest, manifest.signature, trusted)
    except SignatureRefused as error:
        return Check("signature", "FAILED", str(error))
    whose = "the key that was given" if trusted else "compare it with the owner's: --receipt-key"
    return Check("signature", "ok", f"{key}, {whose}")


def _epsilon(manifest: DeltaManifest) -> Iterator[Check]:
    """ε of the mechanism, by privacy-loss distributions, and by Rényi DP, which must lie above."""
    receipt, m = manifest.receipt, manifest.receipt.mechanism
    cap = batch_cap(m.num_examples, m.expected_batch_size)
    yield _check("batch cap", m.batch_cap == cap, f"{m.batch_cap}, due {cap}")
    cost, stated = accountant.epsilon([m], float(receipt.delta)), float(receipt.epsilon)
    is_within = cost <= stated * (1 + EPSILON_TOLERANCE)
    yield _check("epsilon", is_within, f"{cost:.4f} by PLD at delta {receipt.delta}, stated {stated:g}")
    bound = accountant.rdp_epsilon(m, float(receipt.delta))
    yield _check(
        "cross-check", cost <= bound * (1 + EPSILON_TOLERANCE), f"{bound:.4f} by RDP, a looser bound"
    )


def _self_test(manifest: DeltaManifest) -> Check:
    figures = manifest.receipt.self_test
    is_right = (
        figures.planted_record_ratio <= PLANTED_RATIO_MAX
        and abs(figures.noise_std_ratio - 1) <= NOISE_RATIO_TOLERANCE
    )
    detail = (
        f"a planted record moved the sum by {figures.planted_record_ratio:.4f} C, "
        f"the noise was {figures.noise_std_ratio:.4f} of what was due"
    )
    return _check("self-test", is_right, detail)


def _delta_file(manifest: DeltaManifest, arguments: argparse.Namespace, open_store: Open) -> Check:
    source = arguments.delta or _beside(arguments.manifest, manifest.file.path)
    if source is None:
        return Check("delta", "-", "not checked: give --delta")
    try:
        with tempfile.TemporaryDirectory() as directory:
            is_same = _is_file(manifest, source, Path(directory), open_store)
    except ObjectDamaged as error:
        return Check("delta", "FAILED", str(error))
    return _check("delta", is_same, f"{source}, {manifest.file.size} bytes")


def _is_file(manifest: DeltaManifest, source: str, scratch: Path, open_store: Open) -> bool:
    if source.startswith(S3):
        open_store().download(source, scratch / "delta", manifest.file)
        return True
    return digest_of_file(Path(source), manifest.file.path) == manifest.file


def _beside(manifest: str, name: str) -> str | None:
    """Where the delta of a manifest lies, if it was not moved."""
    if manifest.startswith(S3):
        return f"{manifest.rpartition('/')[0]}/{name}"
    path = Path(manifest).parent / name
    return str(path) if path.exists() else None


def _grant(manifest: DeltaManifest, arguments: argparse.Namespace, open_store: Open) -> Check:
    if arguments.plan is None:
        return Check("grant", "-", "not checked: give --plan, the round's plan.json")
    plan = _record(arguments.plan, RoundPlan, open_store)
    planned = next((p for p in plan.cohort if p.client == manifest.client), None)
    if planned is None:
        return Check("grant", "FAILED", f"{manifest.client} is not in the cohort of {plan.round}")
    try:
        return _check("grant", True, f"signed by {_granted(manifest, planned, arguments.hub_key)}")
    except (SignatureRefused, receipts.ReceiptRefused) as error:
        return Check("grant", "FAILED", str(error))


def _granted(manifest: DeltaManifest, planned: PlannedClient, hub_key: str | None) -> str:
    receipts.check(manifest, planned.grant, manifest.signature.key if manifest.signature else "")
    return verify(planned.grant, planned.grant_signature, hub_key)


def _check(name: str, is_true: bool, detail: str) -> Check:
    return Check(name, "ok" if is_true else "FAILED", detail)


def _first_entry(store: ObjectStore, uri: str) -> LedgerEntry | None:
    try:
        return _record(ledger_entry(uri, 0), LedgerEntry, lambda: store)
    except ObjectMissing:
        return None


def _row(entry: LedgerEntry) -> tuple[str, ...]:
    recorded = f"{entry.recorded_at.astimezone(UTC):%Y-%m-%d %H:%M}"
    run = entry.run_key[:RUN_KEY_SHOWN]
    return str(entry.n), recorded, entry.kind.value, run, entry.hub_namespace, _mechanism(entry.mechanism)


def _balance(chain: ledger.Chain, delta: float, budget: float | None) -> Iterator[str]:
    """Composed, never added: two runs at ε = 3 are about 4.35."""
    spent = accountant.epsilon(chain.launched(), delta)
    charged = accountant.epsilon(chain.charged(), delta)
    yield f"data set   {chain.entries[0].data_set}: {len(chain.entries)} entries, every one follows"
    yield f"head       {chain.head}"
    yield f"spent      {spent:.4f} at delta {delta:g}"
    yield f"reserved   {max(0.0, charged - spent):.4f}"
    if budget is not None:
        yield f"remaining  {max(0.0, budget - charged):.4f} of {budget:g}"


def _record(source: str, kind: type[RecordT], open_store: Open) -> RecordT:
    """A record in a file or an object."""
    data = open_store().get(source) if source.startswith(S3) else Path(source).read_bytes()
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "its JSON"
        raise ReceiptUnreadable(
            f"{source} is not a {kind.__name__} ({where}: {fault['msg']}): a delta's is manifest.json beside "
            "it, a round's plan.json"
        ) from error


def _print_table(rows: Sequence[Iterable[str]]) -> None:
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
