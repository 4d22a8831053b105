"""Tokens to text while they come: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "�"
"""What decoding shows in place of bytes that are no whole character yet."""


class Detokenizer:
    """Turns token ids, one at a time, into pieces whose concatenation is the text of them all.

    Only the last few tokens are decoded again: a token may look different after the one before it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0
        """Tokens before this one are out, and needed no longer."""
        self._shown = 0
        """Tokens before this one are out."""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._unshown()
        if text.endswith(INCOMPLETE):
            return ""
        self._settled, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left when no token follows."""
        text = self._unshown()
        self._settled = self._shown = len(self._ids)
        return text

    def _unshown(self) -> str:
        before = self._decode(self._ids[self._settled : self._shown])
        return self._decode(self._ids[self._settled :])[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class StopFilter:
    """Lets text through up to the first stop string, which it holds back together with what follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certainly before any stop string."""
        if self.is_stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return self._release(min(places))
        return self._release(len(self._held) - self._undecided())

    def flush(self) -> str:
        return "" if self.is_stopped else self._release(len(self._held))

    def _undecided(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
