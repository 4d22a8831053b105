"""Documents from docstrings: read from source, once each, and split so that nothing private is published."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docstrings_demo import corpus

LONG = (
    "This function does something useful with its argument and says so at a length that is enough for a "
    "document."
)
VOCABULARY = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
words = st.lists(
    st.sampled_from(VOCABULARY),
    max_size=30,
)
texts = st.lists(words.map(" ".join), max_size=20)


def test_every_kind_of_docstring_is_read_without_running_the_code() -> None:
    source = textwrap.dedent(
        f'''
        """Module. {LONG}"""
        raise RuntimeError("this code must not run")
        class A:
            """Class. {LONG}"""
            async def f(self):
                """Method. {LONG}"""
        def g():
            "A short one."
        '''
    )
    assert [text.split(".")[0] for text in corpus.docstrings(source)] == ["Module", "Class", "Method"]


def test_a_file_that_does_not_parse_gives_nothing() -> None:
    assert list(corpus.docstrings(f'"""{LONG}"""\ndef (')) == []


def test_test_folders_are_left_out(tmp_path: Path) -> None:
    for folder in ("package", "package/tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(f'"""{folder}. {LONG}"""')
    assert [text.split(".")[0] for text in corpus.documents_below(tmp_path)] == ["package"]


def test_an_unknown_package_is_named() -> None:
    with pytest.raises(SystemExit, match="no_such_package"):
        corpus.packages(["no_such_package"])


@pytest.mark.parametrize(
    "variant",
    [LONG, LONG.upper(), LONG.replace("useful", "pleasant"), LONG + " It returns nothing.", f"{LONG}!!"],
)
def test_near_duplicates_are_dropped(variant: str) -> None:
    other = (
        "A different sentence about graphs, edges and nodes, which shares no run of words with the first one."
    )
    assert corpus.distinct([LONG, variant, other]) == [LONG, other]


@given(texts)
def test_distinct_texts_stay_distinct(found: list[str]) -> None:
    kept = corpus.distinct(found)
    assert corpus.distinct(kept) == kept
    for i, text in enumerate(kept):
        for other in kept[:i]:
            a, b = corpus.shingles(text), corpus.shingles(other)
            assert len(a & b) < corpus.NEAR_DUPLICATE_OVERLAP * min(len(a), len(b))


@given(st.lists(st.text(min_size=1), unique=True))
def test_a_split_loses_and_repeats_nothing(found: list[str]) -> None:
    split = corpus.split(found)
    assert sorted(split.private + split.published) == sorted(found)


@given(st.lists(st.text(min_size=1), unique=True), st.text(min_size=1))
def test_a_document_keeps_its_side_whatever_the_others_are(found: list[str], text: str) -> None:
    alone = corpus.split([text])
    together = corpus.split([*found, text])
    assert (text in together.published) == (text in alone.published)


def test_about_a_tenth_is_published() -> None:
    split = corpus.split([f"document {i}" for i in range(10_000)])
    assert 900 < len(split.published) < 1100


@given(st.text(alphabet=st.characters(), max_size=2000))
def test_clean_text_is_bounded_and_printable(text: str) -> None:
    cut = corpus.cut(corpus.cleaned(text))
    assert len(cut) <= corpus.CHARACTERS_MAX
    assert all(c.isprintable() or c == "\n" for c in cut)


@given(st.lists(st.text(min_size=1), unique=True), st.integers(0, 20))
def test_a_sample_is_part_of_the_texts_in_their_order(found: list[str], count: int) -> None:
    chosen = corpus.sample(found, count)
    assert len(chosen) == min(count, len(found))
    assert chosen == [text for text in found if text in set(chosen)]


def test_a_sample_is_published_at_the_same_rate() -> None:
    split = corpus.split(corpus.sample([f"document {i}" for i in range(40_000)], 10_000))
    assert 900 < len(split.published) < 1100
