"""Who signed what: nothing altered, moved or signed by somebody else passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from round_worlds import a_client, a_delta, a_plan, a_round
from signers import HUB_KEY, OWNER_KEY, TENANT_SECRET

from tributary_accounting.receipts import ReceiptRefused, check
from tributary_accounting.signatures import SignatureRefused, SigningKey, verify
from tributary_api.records import DeltaManifest, Grant, Signature

PLAN = a_plan(a_round(), [a_client("a"), a_client("b")])
GRANT = PLAN.cohort[0].grant
MANIFEST = a_delta(PLAN, "a")


def test_rfc_8032_test_1() -> None:
    """The public key of the first test vector in section 7.1."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert SigningKey(seed).public == f"ed25519:{public}"


def test_the_hub_signs_every_grant_of_its_plan() -> None:
    assert {verify(p.grant, p.grant_signature) for p in PLAN.cohort} == {HUB_KEY.public}


def test_a_delta_counts_with_its_own_grant_and_its_owners_signature() -> None:
    check(MANIFEST, GRANT, OWNER_KEY.public)
    with pytest.raises(SignatureRefused, match="only ed25519:"):
        check(MANIFEST, GRANT, HUB_KEY.public)
    with pytest.raises(ReceiptRefused, match="grant"):
        check(MANIFEST, PLAN.cohort[1].grant, OWNER_KEY.public)


def leaves(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all scalars of a JSON value."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return [path]
    return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


def altered(record: dict[str, object], path: tuple[str | int, ...]) -> dict[str, object]:
    """A copy in which one scalar is another valid one of its kind."""
    *way, last = path
    inner: object = record
    for step in way:
        inner = inner[step]  # type: ignore[index]
    old = inner[last]  # type: ignore[index]
    flipped = str(old)[:-1] + ("1" if str(old)[-1:] != "1" else "2")
    inner[last] = old + 1 if isinstance(old, int | float) else flipped  # type: ignore[index, operator]
    return record


@given(st.data())
def test_any_altered_fact_of_a_manifest_is_noticed(data: st.DataObject) -> None:
    plain = MANIFEST.to_json_object()
    path = data.draw(st.sampled_from(leaves(plain)))
    try:
        forged = DeltaManifest.model_validate(altered(plain, path))
    except ValueError:
        return  # not even a manifest
    with pytest.raises((SignatureRefused, ReceiptRefused)):
        check(forged, GRANT, OWNER_KEY.public)


@given(st.data())
def test_any_altered_fact_of_a_grant_is_noticed(data: st.DataObject) -> None:
    plain = GRANT.to_json_object()
    path = data.draw(st.sampled_from(leaves(plain)))
    try:
        forged = Grant.model_validate(altered(plain, path))
    except ValueError:
        return
    with pytest.raises(SignatureRefused):
        verify(forged, PLAN.cohort[0].grant_signature)


def test_a_signature_of_one_kind_is_none_of_another() -> None:
    """The same bytes under another record's name would be."""
    signature = OWNER_KEY.sign(GRANT)
    key = OWNER_KEY._private
    without_kind = Signature(key=OWNER_KEY.public, value=key.sign(GRANT.canonical_json()).hex())
    assert verify(GRANT, signature) == OWNER_KEY.public
    with pytest.raises(SignatureRefused):
        verify(GRANT, without_kind)


def test_unsigned_is_refused() -> None:
    with pytest.raises(SignatureRefused, match="not signed"):
        check(MANIFEST.model_copy(update={"signature": None}), GRANT, OWNER_KEY.public)


def test_each_secret_has_its_own_key_and_it_is_not_the_secret() -> None:
    other = SigningKey.of_tenant(bytes(reversed(TENANT_SECRET)))
    assert len({OWNER_KEY.public, other.public, SigningKey(TENANT_SECRET).public}) == 3
    assert TENANT_SECRET.hex() not in repr(OWNER_KEY)
    with pytest.raises(ValueError, match="32 random bytes"):
        SigningKey(b"short")
