import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from sabrage.data.documents import find_files, read_documents
from sabrage.data.folder import ShardFolder
from sabrage.data.shards import open_shard
from sabrage.data.text import Survey, encode_text
from sabrage.data.tokenizer import ByteTokenizer
from sabrage.parts import DataError

DOCUMENTS = [f"Document {index} says: {'word ' * (index % 7)}and ends. €" for index in range(300)]


def encode(paths, folder, **options):
    options = {"num_workers": 1, "tokenizer": ByteTokenizer(), "console": Console(quiet=True), **options}
    return encode_text(paths, folder, **options)


def write_lines(path, documents, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in documents))
    return path


def read_back(folder, kind):
    """The documents of one split; each must follow an end of text."""
    paths = sorted(folder.glob(f"{kind}_*.bin"))
    if not paths:
        return []
    tokens = np.concatenate([open_shard(path, vocab_size=257) for path in paths])
    assert tokens[0] == 256
    return [
        ByteTokenizer().decode(piece[1:]) for piece in np.split(tokens, np.flatnonzero(tokens == 256))[1:]
    ]


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "documents.jsonl", DOCUMENTS)


def test_every_document_lands_on_one_side_in_its_order(lines, tmp_path):
    report = encode([lines], tmp_path / "out", validation_fraction=0.1)
    train, validation = read_back(tmp_path / "out", "train"), read_back(tmp_path / "out", "val")
    held = set(validation)
    assert train == [text for text in DOCUMENTS if text not in held]
    assert validation == [text for text in DOCUMENTS if text in held]
    assert 10 < len(validation) < 60
    assert report.documents == 300
    assert report.train_tokens + report.validation_tokens == sum(len(text.encode()) + 1 for text in DOCUMENTS)


def test_a_document_keeps_its_side_whatever_stands_beside_it(lines, tmp_path):
    encode([lines], tmp_path / "all", validation_fraction=0.2)
    encode(
        [write_lines(tmp_path / "half.jsonl", DOCUMENTS[::-2])], tmp_path / "half", validation_fraction=0.2
    )
    held = set(read_back(tmp_path / "all", "val"))
    assert set(read_back(tmp_path / "half", "val")) == held & set(DOCUMENTS[::-2])


def test_processes_write_the_same_files_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sabrage.data.text.BATCH_CHARACTERS", 1000)
    source = write_lines(tmp_path / "documents.jsonl", DOCUMENTS)
    one, two = (encode([source], tmp_path / str(count), num_workers=count) for count in (1, 2))
    for path, other in zip(one.shards, two.shards, strict=True):
        assert path.read_bytes() == other.read_bytes()


def test_shards_have_the_size_asked_for_and_lose_nothing(lines, tmp_path):
    report = encode([lines], tmp_path / "out", shard_tokens=1000)
    sizes = [len(open_shard(path, vocab_size=257)) for path in report.shards if "train" in path.name]
    assert sizes[:-1] == [1000] * (len(sizes) - 1)
    assert sum(sizes) == report.train_tokens
    assert report.shards[1].name == "train_000001.bin"
    train, validation = read_back(tmp_path / "out", "train"), read_back(tmp_path / "out", "val")
    assert sorted([*train, *validation]) == sorted(DOCUMENTS)


def test_the_folder_opens_as_a_data_source(lines, tmp_path):
    report = encode([lines], tmp_path / "out")
    corpus = ShardFolder(path=str(tmp_path / "out"), vocab_size=257, block_tokens=64).open()
    assert corpus.track == "own"
    assert len(corpus.validation) == report.validation_tokens


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_splits_get_a_document_however_odd_the_fraction(tmp_path, fraction):
    source = write_lines(tmp_path / "two.jsonl", DOCUMENTS[:2])
    encode([source], tmp_path / "out", validation_fraction=fraction)
    assert len(read_back(tmp_path / "out", "train")) == len(read_back(tmp_path / "out", "val")) == 1


def test_without_a_fraction_nothing_is_held_out(lines, tmp_path):
    encode([lines], tmp_path / "out", validation_fraction=0)
    assert read_back(tmp_path / "out", "train") == DOCUMENTS
    assert not list((tmp_path / "out").glob("val*"))


def test_a_single_document_has_its_tail_held_out(tmp_path):
    text = "".join(f"line {index}\n" for index in range(1000))
    (tmp_path / "book.txt").write_text(text)
    encode([tmp_path / "book.txt"], tmp_path / "out", validation_fraction=0.1)
    (head,), (tail,) = read_back(tmp_path / "out", "train"), read_back(tmp_path / "out", "val")
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.09 < len(tail) / len(text) < 0.11


def test_folders_are_read_through_with_every_kind_of_file(tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a.txt").write_text("\ufefffrom text", encoding="utf-8")
    write_lines(source / "b.jsonl", ["from lines", "", "  "])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from parquet", None]}), source / "c.parquet")
    (source / "notes.md").write_text("passed over")
    found = list(read_documents(find_files([source]), "text"))
    assert found == ["from lines", "from parquet", "from text"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_field_can_be_named(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_lines(path, ["body text"], field="body")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"body": ["body text"]}), path)
    assert list(read_documents([path], "body")) == ["body text"]
    with pytest.raises(DataError, match=rf"rows\.{kind}.*'text'.*it has: .*body.*--field"):
        list(read_documents([path], "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a', "line 2: not JSON"),
        ('{"other": 1}', "line 2: no field 'text', it has: other"),
        ("[1]", "line 2: no field 'text', it has: a list, not an object"),
        ('{"text": 7}', "line 2: 'text' is int"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl, {message}"):
        encode([tmp_path / "bad.jsonl"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
        encode([tmp_path / "latin.txt"], tmp_path / "out")


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n\.parquet: 'text' is int"):
        list(read_documents([tmp_path / "n.parquet"], "text"))


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"p\.parquet: not a parquet file"):
        list(read_documents([tmp_path / "p.parquet"], "text"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "p.parquet").touch()
    with pytest.raises(DataError, match=r"sabrage\[parquet\]"):
        list(read_documents([tmp_path / "p.parquet"], "text"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", " \n", "holds no text"),
        ("notes.md", "text", r"got a \.md file, allowed: \.txt, \.jsonl, \.parquet"),
        ("folder", None, "no file to read"),
    ],
)
def test_input_without_text_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        encode([path], tmp_path / "out")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: no such file"):
        encode([tmp_path / "absent"], tmp_path / "out")


def test_shards_of_an_earlier_time_are_never_mixed_in(lines, tmp_path):
    encode([lines], tmp_path / "out")
    with pytest.raises(DataError, match=r"out: already holds \.bin files"):
        encode([lines], tmp_path / "out")


def test_an_interruption_leaves_no_shard(lines, tmp_path, monkeypatch):
    def interrupt(*anything):
        raise KeyboardInterrupt

    monkeypatch.setattr("sabrage.data.text.shutil.copyfile", interrupt)
    monkeypatch.setattr("sabrage.data.text.GPT2Tokenizer", FakeGPT2)
    with pytest.raises(KeyboardInterrupt):
        encode([lines], tmp_path / "out", tokenizer=FakeGPT2(lines))
    assert not list((tmp_path / "out").iterdir())


class FakeGPT2(ByteTokenizer):
    """Bytes that come with a rank file."""

    def __init__(self, ranks):
        self.ranks = ranks


def test_the_rank_file_goes_along(lines, tmp_path, monkeypatch):
    monkeypatch.setattr("sabrage.data.text.GPT2Tokenizer", FakeGPT2)
    encode([lines], tmp_path / "out", tokenizer=FakeGPT2(lines))
    assert (tmp_path / "out" / "gpt2.tiktoken").read_bytes() == lines.read_bytes()


def test_half_a_surrogate_pair_in_json_stops_nothing(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "a\\ud800"}\n{"text": "b"}\n')
    encode([tmp_path / "odd.jsonl"], tmp_path / "out")
    both = [*read_back(tmp_path / "out", "train"), *read_back(tmp_path / "out", "val")]
    assert sorted(both) == ["a?", "b"]


@pytest.mark.parametrize(
    ("option", "message"),
    [({"validation_fraction": 1.0}, "validation_fraction=1.0"), ({"shard_tokens": 0}, "shard_tokens=0")],
)
def test_numbers_out_of_range_are_refused(lines, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        encode([lines], tmp_path / "out", **option)


def test_equal_documents_are_each_cut():
    split = list(Survey.of(["ab\ncd"] * 2).split(["ab\ncd"] * 2, 0.2))
    assert split == [("ab\n", False), ("cd", True)] * 2
