"""The keys of tests: the hub's, and one owner's."""

from __future__ import annotations

import base64

from tributary_accounting.signatures import SigningKey

HUB_SEED = bytes(range(32, 64))
HUB_KEY = SigningKey(HUB_SEED)
HUB_ENVIRONMENT = {"TRIBUTARY_SIGNING_KEY": base64.b64encode(HUB_SEED).decode()}
TENANT_SECRET = bytes(range(32))
OWNER_KEY = SigningKey.of_tenant(TENANT_SECRET)
