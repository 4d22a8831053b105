from __future__ import annotations

import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore

from tributary_api.client import ClientData
from tributary_api.failures import Reason
from tributary_api.shared import TaskKind
from tributary_worker.batches import CHARACTERS_PER_TOKEN_MAX, TokenizedRecords
from tributary_worker.data import MountedFiles, Record, StoredFiles, files_of, read_private_data
from tributary_worker.failures import StageFailure
from tributary_worker.objectives import IGNORED_LABEL, causal_lm, sequence_classification
from tributary_worker.privacy.sampler import EMPTY

CPU = torch.device("cpu")


def client_data(**fields):
    defaults = {"name": "notes", "uri": "s3://data/notes/", "numExamples": 10, "holdoutFraction": "0"}
    return ClientData.model_validate(defaults | fields)


def read(files, num_examples=10, **fields):
    store = MemoryStore()
    for name, content in files.items():
        store.put_new(f"s3://data/notes/{name}", content)
    data = client_data(**fields)
    return read_private_data(StoredFiles(store, data.uri), data, num_examples)


def texts(private):
    return sorted(r.text for r in private.records if r.text is not None)


def jsonl(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def test_the_three_formats():
    assert texts(read({"a.jsonl": jsonl({"text": "one"}, {"text": "two"})})) == ["one", "two"]
    assert texts(read({"a.parquet": parquet(text=["one", "two"])}, format="parquet")) == ["one", "two"]
    assert texts(read({"a.txt": b"one", "b/c.txt": b"two"}, format="text")) == ["one", "two"]


def test_fields_have_the_names_that_the_owner_gives():
    rows = jsonl({"note": "one", "class": 2}, {"note": "two", "class": "no"}, {"note": "three"})
    private = read({"a": rows}, textField="note", labelField="class")
    assert [(r.text, r.label) for r in private.records if r.text] == [("one", 2)]
    table = parquet(note=["one", None], kind=[1, 0])
    private = read({"a": table}, format="parquet", textField="note", labelField="kind")
    assert [(r.text, r.label) for r in private.records if r.text] == [("one", 1)]


@pytest.mark.parametrize(
    "bad",
    ["{", "[]", "7", '{"text": null}', '{"text": " "}', '{"texts": "x"}', "[" * 5000, '{"text": 1e999}'],
)
def test_a_bad_record_keeps_its_place_and_is_empty(bad):
    private = read({"a": jsonl({"text": "good"}, bad)}, num_examples=2)
    assert [r.text for r in private.records].count(None) == 1
    assert texts(private) == ["good"]


def test_a_file_that_cannot_be_decoded_is_a_bad_record():
    assert texts(read({"a.txt": b"\xff\xfe\x00", "b.txt": b"fine"}, format="text")) == ["fine"]
    good = parquet(text=["fine"])
    assert texts(read({"a.parquet": b"junk", "b.parquet": good}, format="parquet")) == ["fine"]


def test_a_cell_that_cannot_be_decoded_is_a_bad_record_and_its_neighbours_are_good():
    broken = pyarrow.array([b"one", b"\xff\xfe", b"three"]).view(pyarrow.string())
    private = read({"a": parquet(text=broken)}, num_examples=3, format="parquet")
    assert texts(private) == ["one", "three"]
    assert [r.text for r in private.records].count(None) == 1


@settings(deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), max_size=30), st.integers(1, 20))
def test_there_are_always_exactly_the_declared_number(contents, num_examples):
    rows = jsonl(*({"text": text} for text in contents), {"text": "at least one"})
    private = read({"a": rows}, num_examples=num_examples)
    assert len(private.records) == num_examples


EMPTIED = ["", "  ", "{}", "{", '{"text": ""}', '{"text": 7}']


@settings(deadline=None)
@given(
    files=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    emptied=st.integers(0),
    form=st.sampled_from(EMPTIED),
    num_examples=st.integers(1, 30),
    holdout=st.sampled_from(["0", "0.5"]),
)
def test_emptying_a_record_in_place_changes_no_other_record(files, emptied, form, num_examples, holdout):
    """The relation that epsilon is stated for: the others keep their membership and their order."""
    rows = {f"f{f}": [json.dumps({"text": f"{f}/{i}"}) for i in range(size)] for f, size in enumerate(files)}
    places = [(name, index) for name, lines in rows.items() for index in range(len(lines))]
    rows["f9"] = [json.dumps({"text": "another keeps the data set readable"})]
    name, index = places[emptied % len(places)]
    neighbour = rows | {name: [*rows[name][:index], form, *rows[name][index + 1 :]]}

    def kept(data):
        stored = {name: "".join(f"{line}\n" for line in lines).encode() for name, lines in data.items()}
        return read(stored, num_examples=num_examples, holdoutFraction=holdout).records

    gone = json.loads(rows[name][index])["text"]
    expected = [Record(r.key, None) if r.text == gone else r for r in kept(rows)]
    assert kept(neighbour) == expected


def test_emptying_a_row_or_a_file_in_place_changes_no_other():
    one, other = [f"row {i}" for i in range(9)], [f"row {i}" if i != 4 else None for i in range(9)]
    for num_examples in range(1, 10):
        rows, neighbour = (
            read({"a": parquet(text=column)}, num_examples, format="parquet").records
            for column in (one, other)
        )
        assert neighbour == [Record(r.key, None) if r.text == "row 4" else r for r in rows]
        files, neighbour = (
            read(
                {f"{i}.txt": (text or "").encode() for i, text in enumerate(column)},
                num_examples,
                format="text",
            )
            for column in (one, other)
        )
        expected = [Record(r.key, None) if r.text == "row 4" else r for r in files.records]
        assert neighbour.records == expected


def test_the_holdout_is_a_part_by_place_and_never_trained_on():
    rows = [{"text": f"record {i}"} for i in range(2000)]
    everything = set(texts(read({"a": jsonl(*rows)}, num_examples=2000)))
    kept = set(texts(read({"a": jsonl(*rows)}, num_examples=2000, holdoutFraction="0.1")))
    fewer = set(texts(read({"a": jsonl(*rows[:500])}, num_examples=2000, holdoutFraction="0.1")))
    assert 0.87 < len(kept) / len(everything) < 0.93
    assert fewer <= kept


def test_any_change_of_the_data_is_another_snapshot():
    a, b = jsonl({"text": "one"}), jsonl({"text": "two"})
    snapshots = [
        read(files).snapshot_hash
        for files in ({"x": a}, {"x": b}, {"y": a}, {"x": a, "y": b}, {"x": a + b"\n"}, {"x": b, "y": a})
    ]
    assert len(set(snapshots)) == len(snapshots)
    assert read({"x": a}).snapshot_hash == snapshots[0]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, Reason.DATA_EMPTY),
        ({"_SUCCESS": b"", ".hidden": b"x"}, Reason.DATA_EMPTY),
        ({"a": b""}, Reason.DATA_EMPTY),
        ({"a": b"\n\n"}, Reason.DATA_UNPARSEABLE),
        ({"a": b"secret word\n{}"}, Reason.DATA_UNPARSEABLE),
    ],
)
def test_faults_of_the_whole_surface_as_a_reason_without_a_word_of_the_data(files, reason):
    with pytest.raises(StageFailure) as failure:
        read(files)
    assert failure.value.reason is reason
    assert "secret" not in failure.value.message


def test_unreachable_data_is_a_reason_and_no_file_is_named(tmp_path):
    data = client_data(uri="pvc://claim/notes/john-doe.txt")
    with pytest.raises(StageFailure) as failure:
        read_private_data(files_of(data, MemoryStore(), tmp_path), data, 10)
    assert failure.value.reason is Reason.DATA_UNREACHABLE
    assert failure.value.retryable


def test_a_mounted_volume_reads_like_a_bucket(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.jsonl").write_bytes(jsonl({"text": "one"}))
    (tmp_path / "notes" / "b.jsonl").write_bytes(jsonl({"text": "two"}))
    data = client_data(uri="pvc://claim/notes")
    files = files_of(data, MemoryStore(), tmp_path)
    assert files == MountedFiles(tmp_path / "notes")
    assert texts(read_private_data(files, data, 10)) == ["one", "two"]


def test_a_file_name_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"na\xefve.jsonl")
    (tmp_path / name).write_bytes(jsonl({"text": "one"}))
    (tmp_path / "other.jsonl").write_bytes(jsonl({"text": "two"}))
    files = files_of(client_data(uri="pvc://claim/"), MemoryStore(), tmp_path)
    assert texts(read_private_data(files, client_data(), 10)) == ["one", "two"]


def tokenized(records, task=TaskKind.CAUSAL_LM, length=8, model_type="llama"):
    config = SimpleNamespace(model_type=model_type, num_labels=3)
    return TokenizedRecords(records, tiny_models.byte_tokenizer(), task, length, config)


def test_every_batch_has_the_same_shape_whatever_is_in_it():
    rows = tokenized([Record(b"", None), Record(b"", "a"), Record(b"", "a long record" * 100)])
    shapes = {
        tuple((name, t.shape, t.dtype) for name, t in rows.batch(indices, CPU).items())
        for indices in ([0, 1], [EMPTY, EMPTY], [2, EMPTY])
    }
    assert len(shapes) == 1


def test_empty_rows_have_no_loss_and_the_others_that_of_their_own_text():
    model = tiny_models.llama()
    rows = tokenized([Record(b"", "hello"), Record(b"", None), Record(b"", "hello, world and more")])
    losses = causal_lm(model, rows.batch([0, EMPTY, 1, 2], CPU))
    ids = torch.tensor(tiny_models.byte_tokenizer()("hello").input_ids)[None]
    alone = model(input_ids=ids, labels=ids).loss
    assert losses[0].item() == pytest.approx(alone.item(), abs=1e-5)
    assert losses[1].item() == losses[2].item() == 0.0
    assert losses[3].item() > 0


def test_a_bidirectional_model_does_not_see_the_padding():
    model = tiny_models.bert_classifier()
    records = [Record(b"", "hello", 1), Record(b"", "a whole sentence", 2), Record(b"", None, 1)]
    rows = tokenized(records, TaskKind.SEQUENCE_CLASSIFICATION, model_type="bert")
    batch = rows.batch([0, 1, 2, EMPTY], CPU)
    losses = sequence_classification(model, batch)
    ids = torch.tensor(tiny_models.byte_tokenizer()("hello").input_ids)[None]
    alone = torch.nn.functional.cross_entropy(model(input_ids=ids).logits, torch.tensor([1]))
    assert losses[0].item() == pytest.approx(alone.item(), abs=1e-5)
    assert losses[1].item() > 0
    assert losses[2].item() == losses[3].item() == 0.0


def test_labels_that_the_model_does_not_have_are_ignored():
    records = [
        Record(b"", "a", 0),
        Record(b"", "b", 2),
        Record(b"", "c", 3),
        Record(b"", "d"),
        Record(b"", None, 1),
    ]
    batch = tokenized(records, TaskKind.SEQUENCE_CLASSIFICATION).batch([0, 1, 2, 3, 4, EMPTY], CPU)
    assert batch["labels"].tolist() == [0, 2, *[IGNORED_LABEL] * 4]
    losses = sequence_classification(tiny_models.llama_classifier(), batch)
    assert (losses != 0).tolist() == [True, True, False, False, False, False]


def test_a_text_is_cut_before_it_can_take_time():
    length = 8
    rows = tokenized([Record(b"", "x" * 10**7)], length=length)
    assert rows.batch([0], CPU)["labels"].shape == (1, length)
    assert CHARACTERS_PER_TOKEN_MAX * length < 10**7


def test_a_text_that_the_tokenizer_refuses_is_a_bad_record():
    assert tokenized([Record(b"", "\ud800")]).batch([0], CPU)["labels"].unique().tolist() == [IGNORED_LABEL]


def test_indices_may_be_of_numpy():
    assert tokenized([Record(b"", "a")]).batch(list(np.array([0, EMPTY])), CPU)["input_ids"].shape == (2, 8)
