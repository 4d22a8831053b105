"""What went wrong, in words for the person who runs the demo."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on. Its text says what happened and what to do."""
