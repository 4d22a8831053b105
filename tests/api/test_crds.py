"""The generated CRDs are fresh, structural and bounded."""

from pathlib import Path

import pytest
import yaml

from tributary_api.crdgen import KINDS, crd, render, stale, to_structural

ROOT = Path(__file__).resolve().parents[2]
KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
FORBIDDEN = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "not", "nullable", "const", "title", "prefixItems"}


def schemas(node):
    """Every schema below `node`, not the maps of properties between them."""
    yield node
    for child in node.get("properties", {}).values():
        yield from schemas(child)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from schemas(node[key])


def schema_of(kind):
    return crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_generated_files_are_fresh():
    assert not stale(ROOT), "run `make generate`"


@KIND
def test_schemas_are_structural(kind):
    for schema in schemas(schema_of(kind)):
        assert not FORBIDDEN & schema.keys()
        assert "type" in schema or schema.get("x-kubernetes-int-or-string"), schema


@KIND
def test_everything_a_user_writes_is_bounded(kind):
    """Without bounds the API server refuses CEL rules as too expensive, and an object may outgrow etcd."""
    for schema in schemas(schema_of(kind)["properties"]["spec"]):
        match schema.get("type"):
            case "array":
                assert "maxItems" in schema, schema
            case "string":
                assert schema.keys() & {"maxLength", "enum", "format"}, schema


@KIND
def test_a_fresh_object_never_looks_healthy(kind):
    status = schema_of(kind)["properties"]["status"]
    assert status["default"].keys() == {"conditions"}
    assert {c["status"] for c in status["default"]["conditions"]} == {"Unknown"}
    below = [s for child in status["properties"].values() for s in schemas(child)]
    assert not [s for s in below if "default" in s], "a status holds only what was observed"


@KIND
def test_kubectl_explain_has_a_text_for_every_field(kind):
    bare = [
        name
        for schema in schemas(schema_of(kind))
        for name, child in schema.get("properties", {}).items()
        if not child.get("description")
    ]
    assert not bare


def test_what_cannot_be_translated_is_refused():
    with pytest.raises(ValueError, match="oneOf"):
        to_structural({"oneOf": [{"type": "string"}]}, {})


def test_numbers_in_a_spec_are_never_floats():
    for kind in KINDS:
        for schema in schemas(schema_of(kind)["properties"]["spec"]):
            assert schema.get("type") != "number", schema


def test_a_missing_or_changed_file_is_stale(tmp_path):
    due = render(tmp_path)
    for path, text in due.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert stale(tmp_path) == {}
    changed, gone = list(due)[:2]
    changed.write_text("edited by hand")
    gone.unlink()
    assert stale(tmp_path).keys() == {changed, gone}


def test_no_string_is_a_number_to_another_yaml_reader():
    """Helm reads YAML 1.2, where a plain 1e-3 is a number; to PyYAML it is a word."""
    for path, text in render(ROOT).items():
        if path.suffix == ".yaml":
            assert [word for word in plain_words(text) if is_number(word)] == []


def plain_words(text: str) -> list[str]:
    """Scalars without quotes that PyYAML takes for strings."""
    plain = [token.value for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken) and token.plain]
    return [value for value in plain if isinstance(yaml.safe_load(value), str)]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
