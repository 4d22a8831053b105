"""Why a private training refuses to start or to go on."""

from __future__ import annotations


class PrivacyError(Exception):
    """A property that the privacy claim rests on does not hold in this process. Nothing may be published."""


class UnsupportedError(Exception):
    """The configuration is valid, but this engine cannot train it privately. The message says what to
    change."""
