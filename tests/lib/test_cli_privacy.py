"""`tributary privacy`, as an owner uses it: on files without any network, and on a real S3 server."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from round_worlds import a_client, a_plan, a_round, nn
from signers import HUB_KEY, OWNER_KEY, TENANT_SECRET

from tributary_accounting import accountant
from tributary_accounting.ledger import Ledger
from tributary_accounting.mechanism import dp_sgd
from tributary_api.client import PrivacyBudget
from tributary_api.records import DeltaManifest, Grant, Receipt, RoundPlan, SelfTestFigures
from tributary_api.shared import StoreEndpoint
from tributary_cli.main import main
from tributary_store.digests import digest_of_bytes
from tributary_store.objectstore import ObjectStore

MECHANISM = dp_sgd(10_000, 256, 40, 0.7471, 0.5)  # ε = 3 at δ = 1e-5
DELTA_BYTES = b"the noised delta"


def a_signed_plan() -> RoundPlan:
    """One client, of whom the accountant's test vector is asked."""
    plan = a_plan(a_round(), [a_client("a")])
    terms = {"mechanism": MECHANISM, "epsilon": "3", "delta": "1e-5"}
    grant = plan.cohort[0].grant.model_copy(update=terms)
    planned = plan.cohort[0].model_copy(update={"grant": grant, "grant_signature": HUB_KEY.sign(grant)})
    return plan.model_copy(update={"cohort": [planned]})


PLAN = a_signed_plan()
GRANT: Grant = PLAN.cohort[0].grant


def a_manifest(**receipt: object) -> DeltaManifest:
    stated = Receipt(
        grant_digest=GRANT.digest,
        mechanism=GRANT.mechanism,
        epsilon=GRANT.epsilon,
        delta=GRANT.delta,
        self_test=SelfTestFigures(planted_record_ratio=1.0, noise_std_ratio=1.001, trainable_parameters=8),
        versions={"torch": "2"},
    ).model_copy(update=receipt)
    plain = {
        "runKey": GRANT.run_key,
        "client": GRANT.client.to_json_object(),
        "baseModelDigest": GRANT.base_model_digest,
        "file": digest_of_bytes(DELTA_BYTES, "delta.safetensors").to_json_object(),
        "l2Norm": 1.0,
        "receipt": stated.to_json_object(),
    }
    return OWNER_KEY.signed(DeltaManifest.model_validate(plain))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_bytes(a_manifest().canonical_json())
    (tmp_path / "delta.safetensors").write_bytes(DELTA_BYTES)
    (tmp_path / "plan.json").write_bytes(PLAN.canonical_json())
    return tmp_path


def results(output: str) -> dict[str, str]:
    """By check: ok, FAILED or -."""
    rows = [line.split() for line in output.splitlines()]
    return {row[1]: row[0] for row in rows if row and row[0] in {"ok", "FAILED", "-"}}


def test_a_true_receipt_is_verified_offline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--receipt-key", OWNER_KEY.public, "--hub-key", HUB_KEY.public]
    plan = ["--plan", str(folder / "plan.json")]
    assert main(["privacy", "verify", str(folder / "manifest.json"), *plan, *keys]) == 0
    output = capsys.readouterr().out
    assert set(results(output).values()) == {"ok"}
    cost = accountant.epsilon([MECHANISM], 1e-5)
    assert f"{cost:.4f} by PLD at delta 1e-5, stated 3" in output
    assert cost == pytest.approx(3.0, abs=2e-3)


def test_what_was_not_given_is_said_not_to_be_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "delta.safetensors").unlink()
    assert main(["privacy", "verify", str(folder / "manifest.json")]) == 0
    found = results(capsys.readouterr().out)
    assert (found["delta"], found["grant"], found["signature"]) == ("-", "-", "ok")


UNDERSTATED = {"epsilon": "2.9"}
SMALL_CAP = {"mechanism": MECHANISM.model_copy(update={"batch_cap": 256})}
QUIET = {"self_test": SelfTestFigures(planted_record_ratio=1.0, noise_std_ratio=0.5, trainable_parameters=8)}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"manifest.json": a_manifest(**UNDERSTATED)}, {"epsilon", "grant"}),
        ({"manifest.json": a_manifest(**SMALL_CAP)}, {"batch", "epsilon", "cross-check", "grant"}),
        ({"manifest.json": a_manifest(**QUIET)}, {"self-test"}),
        ({"manifest.json": HUB_KEY.signed(a_manifest())}, {"signature"}),
        ({"manifest.json": a_manifest().model_copy(update={"signature": None})}, {"signature", "grant"}),
        ({"manifest.json": a_manifest().model_copy(update={"run_key": "0" * 40})}, {"signature", "grant"}),
        ({"delta.safetensors": b"another delta..."}, {"delta"}),
        ({"plan.json": PLAN.model_copy(update={"cohort": []})}, {"grant"}),
    ],
)
def test_each_untrue_fact_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], failing: set[str]
) -> None:
    for name, content in change.items():
        data = content if isinstance(content, bytes) else content.canonical_json()  # type: ignore[attr-defined]
        (folder / name).write_bytes(data)
    plan = ["--plan", str(folder / "plan.json")]
    argv = ["privacy", "verify", str(folder / "manifest.json"), "--receipt-key", OWNER_KEY.public, *plan]
    assert main(argv) == 1
    found = results(capsys.readouterr().out)
    assert {name for name, result in found.items() if result == "FAILED"} == failing


def test_another_record_is_no_receipt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "verify", str(folder / "plan.json")]) == 1
    assert "is not a DeltaManifest" in capsys.readouterr().err


def test_the_key_to_pin_follows_from_the_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_bytes(TENANT_SECRET)
    assert main(["privacy", "key", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out == f"{OWNER_KEY.public}\n"
    (tmp_path / "key").write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
    assert main(["privacy", "key", str(tmp_path / "key")]) == 1
    assert "base64 -d" in capsys.readouterr().err


@pytest.fixture
def store(s3, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint_for_host)
    return ObjectStore.open(StoreEndpoint(endpoint=s3.endpoint_for_host), s3.access_key, s3.secret_key)


@pytest.mark.cluster
def test_a_receipt_in_the_bucket(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "s3://plain/clients/a/a/rounds/r/"
    store.put_new(f"{uri}manifest.json", a_manifest().canonical_json())
    store.put_new(f"{uri}delta.safetensors", DELTA_BYTES)
    assert main(["privacy", "verify", f"{uri}manifest.json"]) == 0
    assert results(capsys.readouterr().out)["delta"] == "ok"
    store.put_new(f"{uri}other", b"another delta...")
    assert main(["privacy", "verify", f"{uri}manifest.json", "--delta", f"{uri}other"]) == 1


@pytest.mark.cluster
def test_a_ledger_in_the_bucket(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "s3://plain/ledger/cli/"
    assert main(["privacy", "ledger", uri]) == 0
    assert "is empty" in capsys.readouterr().out
    book = Ledger(store, uri, nn("a"), lambda: datetime(2026, 1, 1, tzinfo=UTC))
    book.reserve(GRANT, PrivacyBudget(epsilon="8", delta="1e-5"))
    book.launch(GRANT, OWNER_KEY.public)
    second = GRANT.model_copy(update={"run_key": "f" * 40})
    book.reserve(second, PrivacyBudget(epsilon="8", delta="1e-5"))
    assert main(["privacy", "ledger", uri, "--epsilon", "8"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    both = accountant.epsilon([MECHANISM, MECHANISM], 1e-5)
    assert lines["remaining"] == f"{8 - both:.4f} of 8"
    assert lines["spent"].startswith("2.99") or lines["spent"].startswith("3.00")
