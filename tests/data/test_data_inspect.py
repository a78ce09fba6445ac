import io

import numpy as np
import pytest
from rich.console import Console

from sabrage.data.inspect import inspect_shards, render
from sabrage.data.shards import write_shard
from sabrage.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from sabrage.parts import DataError


def write_documents(path, texts):
    tokens = [token for text in texts for token in (256, *text.encode())]
    write_shard(path, np.array(tokens))
    return path


@pytest.fixture
def folder(tmp_path):
    write_documents(tmp_path / "train_000000.bin", ["a", "bcd", "x" * 100])
    write_documents(tmp_path / "val_000000.bin", ["yes"])
    return tmp_path


def test_a_folder_is_counted_shard_by_shard(folder):
    found = inspect_shards(folder, tokenizer=ByteTokenizer())
    assert [(shard.name, shard.tokens, shard.documents) for shard in found.shards] == [
        ("train_000000.bin", 107, 3),
        ("val_000000.bin", 4, 1),
    ]
    assert (found.tokens, found.documents) == (111, 4)


def test_lengths_are_counted_by_powers_of_two(folder):
    assert inspect_shards(folder, tokenizer=ByteTokenizer()).lengths == (0, 1, 2, 0, 0, 0, 1)


def test_one_shard_shows_its_own_text(folder):
    found = inspect_shards(folder / "val_000000.bin", tokenizer=ByteTokenizer(), num_sample_tokens=3)
    assert found.sample == "<|endoftext|>ye"
    assert found.documents == 1


def test_a_shard_without_any_document_start_is_no_error(tmp_path):
    write_shard(tmp_path / "train.bin", np.arange(10))
    found = inspect_shards(tmp_path, tokenizer=ByteTokenizer())
    assert (found.documents, found.lengths) == (0, ())
    Console(quiet=True).print(render(found))


def test_without_the_tokenizers_ranks_the_sample_says_why(tmp_path, monkeypatch):
    def refuse(ranks):
        raise DataError("no ranks here")

    monkeypatch.setattr("sabrage.data.tokenizer.load_encoding", refuse)
    write_shard(tmp_path / "train.bin", np.array([50256, 1, 2]))
    found = inspect_shards(tmp_path, tokenizer=GPT2Tokenizer())
    assert found.documents == 1
    assert found.sample == "(no sample: no ranks here)"


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.bin file"):
        inspect_shards(tmp_path, tokenizer=ByteTokenizer())


def test_the_picture_shows_counts_bars_and_text(folder):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(inspect_shards(folder, tokenizer=ByteTokenizer())))
    text = console.export_text()
    assert "train_000000.bin" in text
    assert "4 to 7" in text
    assert "█" * 40 in text
    assert "<|endoftext|>a" in text
