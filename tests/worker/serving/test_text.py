"""Laws of streamed text: pieces add up to the whole, and nothing of a stop string gets out."""

from __future__ import annotations

import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from tributary_worker.serving.text import INCOMPLETE, Detokenizer, StopFilter

TOKENIZER = tiny_models.byte_tokenizer()


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_pieces_add_up_to_the_text_and_hold_whole_characters(text):
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in TOKENIZER(text).input_ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert INCOMPLETE in text or not any(INCOMPLETE in piece for piece in pieces)


@given(st.lists(st.integers(1, 256), max_size=40))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text_come_out_as_decoding_shows_them(ids):
    detokenizer = Detokenizer(TOKENIZER)
    shown = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert shown == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


chunks = st.lists(st.text("ab", max_size=4), max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(chunks, stops)
@settings(max_examples=500)
def test_text_ends_before_the_first_stop_string(chunks, stops):
    text = "".join(chunks)
    stop_filter = StopFilter(stops)
    pushed = "".join(stop_filter.push(chunk) for chunk in chunks)
    shown = pushed + stop_filter.flush()
    assert text.startswith(shown)
    assert stop_filter.is_stopped == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    if not stop_filter.is_stopped:
        assert shown == text
    else:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


@given(chunks, stops)
def test_no_text_is_held_back_without_need(chunks, stops):
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.push(chunk) for chunk in chunks)
    rest = "".join(chunks)[len(shown) :]
    if not stop_filter.is_stopped and rest:
        assert any(stop.startswith(rest) for stop in stops)
