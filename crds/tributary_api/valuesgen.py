"""The schema of the values of charts/tributary-client: Helm refuses a wrong consent before the API server has to.

The spec is a FederatedClient's, so its schema comes from the model; a misspelt field is an error here too.
"""

from __future__ import annotations

import json
from typing import Any

from tributary_api.client import FederatedClientSpec

Schema = dict[str, Any]

NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
FLAG: Schema = {"type": "boolean"}
SECOND_CLIENT = (
    "A second client of a namespace needs sharedObjects.create=false, and noiseKey.create=false or another "
    "client.spec.privacy.noiseKeySecret."
)
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def client_values_schema() -> str:
    """values.schema.json of charts/tributary-client."""
    spec = FederatedClientSpec.model_json_schema(
        by_alias=True, mode="validation", ref_template="#/$defs/{model}"
    )
    definitions = {name: _closed(schema) for name, schema in spec.pop("$defs").items()}
    return (
        json.dumps(
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                **_closed({"type": "object", "properties": _values()}),
                "required": ["client", "operator"],
                "$defs": {**definitions, "FederatedClientSpec": _closed(spec)},
            },
            indent=1,
        )
        + "\n"
    )


def _values() -> Schema:
    ports: Schema = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 65535}}
    cidrs: Schema = {"type": "array", "items": {"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]{1,3}$"}}
    client = _object(name=NAME, labels=LABELS, spec={"$ref": "#/$defs/FederatedClientSpec"})
    return {
        "namespace": _object(name={"type": "string"}, create=FLAG, labels=LABELS),
        "operator": _object(namespace=NAME, serviceAccountName=NAME),
        "client": {**client, "required": ["name", "spec"]},
        "sharedObjects": {**_object(create=FLAG), "description": SECOND_CLIENT},
        "credentials": _keys(),
        "dataCredentials": _keys(),
        "noiseKey": {**_object(create=FLAG), "description": SECOND_CLIENT},
        "networkPolicy": _object(enabled=FLAG, egressPorts=ports, egressCidrs=cidrs),
        "global": {"type": "object"},
    }


def _keys() -> Schema:
    return _object(accessKeyId={"type": "string"}, secretAccessKey={"type": "string"})


def _object(**properties: Schema) -> Schema:
    return _closed({"type": "object", "properties": properties})


def _closed(schema: Schema) -> Schema:
    """Unknown fields are errors: in a chart's values they are always a mistake."""
    return {**schema, "additionalProperties": False} if "properties" in schema else schema
