import json
import math
import platform
import sys

import numpy as np
import pytest

from sabrage.data import embedded
from sabrage.data.embedded import (
    EmbeddedText,
    cache_folder,
    docstrings,
    embedded_folder,
    is_prose,
    without_repeats,
)
from sabrage.data.tokenizer import ByteTokenizer
from sabrage.parts import DataError

# Ten words or more in a row are those of one document only, whatever it is filled with.
PROSE = "A paragraph of plain words that is long for {} prose and may be read by anybody at all."
MODULE = '''"""{module}"""

class Thing:
    """{method}"""

def short():
    """Too short."""

async def session():
    """>>> {module}"""
'''


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The real thing, built once."""
    folder = tmp_path_factory.mktemp("cache")
    EmbeddedText().open(folder)
    return folder


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of two modules and a test, in place of the real one."""
    folder = tmp_path / "library"
    for name in ("b.py", "a/c.py", "test/d.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE.format(module=PROSE.format(name), method=PROSE.format("method " + name)))
    (folder / "template.py").write_text("not python {{")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    return folder


def documents_of(tokens):
    return [ByteTokenizer().decode(piece) for piece in np.split(tokens, np.flatnonzero(tokens == 256))[1:]]


def test_it_gives_over_a_million_bytes_of_training_text_and_a_tenth_of_it_for_validation(cache):
    corpus = EmbeddedText().open(cache)
    assert corpus.fingerprint["tokens"]["train"] > 1_000_000
    assert 0.05 < len(corpus.validation) / corpus.fingerprint["tokens"]["train"] < 0.2
    assert (corpus.track, corpus.vocab_size) == ("embedded", 257)
    assert corpus.train.rows(0, 2, 512).shape == (4, 513)


def test_the_fingerprint_records_python_hashes_and_entropy(cache):
    facts = EmbeddedText().open(cache).fingerprint
    assert facts["python"] == platform.python_version()
    assert set(facts["sha256"]) == {"train", "val"}
    assert 2.5 < facts["unigram_entropy"] < math.log(257)
    json.dumps(facts)


def test_no_document_is_on_both_sides_or_twice(cache):
    corpus = EmbeddedText().open(cache)
    train = documents_of(np.asarray(corpus.train.shards[0]))
    validation = documents_of(np.asarray(corpus.validation))
    assert len({*train, *validation}) == len(train) + len(validation)


@pytest.mark.parametrize(("width", "most"), [(64, 0.02), (128, 0.002), (512, 0.0)])
def test_hardly_a_line_and_no_paragraph_of_validation_stands_in_training(cache, width, most):
    corpus = EmbeddedText().open(cache)
    # The end of text becomes zero, which no text has.
    train = np.asarray(corpus.train.shards[0]).astype(np.uint8).tobytes()
    validation = np.asarray(corpus.validation).astype(np.uint8).tobytes()
    starts = range(0, len(validation) - width, 101)
    seen = sum(validation[start : start + width] in train for start in starts)
    assert seen <= most * len(starts)


def words(first, count=12):
    return " ".join(f"word{index}" for index in range(first, first + count))


def test_a_repeated_paragraph_stays_in_the_longer_document_only():
    long = f"{words(0)}\n\n{words(100)}\n\n{words(200, 30)}"
    short = f"{words(300)}\n\n{words(100)}\n\n{words(400)}"
    assert list(without_repeats([short, long])) == [long, f"{words(300)}\n\n{words(400)}"]


def test_a_repetition_is_found_across_other_line_breaks_and_within_a_paragraph():
    quoted = words(0, 10)
    long, short = f"{words(100, 30)} {quoted}", f"{words(200, 5)}\n   {quoted.replace(' ', chr(10), 3)} end"
    assert list(without_repeats([long, short])) == [long]


def test_fewer_words_in_a_row_are_no_repetition():
    documents = [f"{words(100, 30)} {words(0, 9)}", f"{words(0, 9)} {words(200, 20)}"]
    assert list(without_repeats(documents)) == documents


def test_a_document_may_repeat_itself_and_short_paragraphs_stay():
    documents = [f"Returns:\n\n{words(0)}\n\nNote:\n\n{words(0)}", f"Returns:\n\n{words(100)}"]
    assert list(without_repeats(documents)) == documents


def test_a_document_left_too_short_is_dropped():
    assert list(without_repeats([words(0, 40), f"{words(5)}\n\n{words(100, 11)}"])) == [words(0, 40)]


def test_the_order_of_the_documents_found_does_not_matter():
    documents = [f"{words(first)}\n\n{words(first + 20)}" for first in (0, 10, 20, 30, 40)]
    assert list(without_repeats(documents)) == list(without_repeats(documents[::-1]))


def test_the_second_opening_reads_what_the_first_wrote(cache, monkeypatch):
    monkeypatch.setattr(embedded, "build", None)
    assert EmbeddedText(block_tokens=64).open(cache).train.block_tokens == 64


def test_a_changed_file_is_refused(tmp_path, library):
    EmbeddedText(block_tokens=8).open(tmp_path)
    path = embedded_folder(tmp_path) / "train.bin"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"train\.bin: changed since it was written; delete"):
        EmbeddedText(block_tokens=8).open(tmp_path)


def test_two_builds_are_equal_byte_for_byte(tmp_path, library):
    for name in ("one", "two"):
        EmbeddedText(block_tokens=8).open(tmp_path / name)
    for name in ("train.bin", "val.bin", "facts.json"):
        one, two = (embedded_folder(tmp_path / place) / name for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_without_the_help_topics_the_docstrings_are_enough(tmp_path, library, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for index in range(60):
        (library / f"module{index}.py").write_text(f'"""{PROSE.format(index)}"""')
    corpus = EmbeddedText(block_tokens=8).open(tmp_path)
    assert corpus.fingerprint["found"] == {"topics": 0, "docstrings": 64}
    assert len(corpus.validation)


def test_docstrings_come_from_sources_in_order_without_tests_and_sessions(library):
    names = ["a/c.py", "method a/c.py", "b.py", "method b.py"]
    assert list(docstrings(library)) == [PROSE.format(name) for name in names]


def test_prose_is_told_from_tables_and_sessions():
    assert is_prose(PROSE)
    assert not is_prose("Too short.")
    assert not is_prose(PROSE + " >>> print(1)")
    assert not is_prose(PROSE + " | 1 | 2 | 3 | 4 |" * 3)


def test_every_document_follows_an_end_of_text():
    tokens = embedded.encode_documents(["ab", "é"])
    assert tokens.tolist() == [256, 97, 98, 256, 0xC3, 0xA9]


def test_the_entropy_of_two_equal_frequencies_is_ln_2():
    assert embedded.unigram_entropy(np.array([3, 9, 9, 3])) == pytest.approx(math.log(2))


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sabrage"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sabrage"


def test_an_impossible_block_is_a_problem():
    assert EmbeddedText().problems() == []
    assert "block_tokens=0" in EmbeddedText(block_tokens=0).problems()[0]
