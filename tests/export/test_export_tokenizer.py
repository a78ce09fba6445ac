import base64
import hashlib
import random
from pathlib import Path

import pytest

from sabrage.data.tokenizer import RANKS_NAME, ByteTokenizer, GPT2Tokenizer
from sabrage.export.tokenizer import alphabet, library_tokenizer, merges

pytest.importorskip("tokenizers", reason="needs the extra hf")
REAL_RANKS = Path(__file__).parents[3] / "shared" / "corpus" / RANKS_NAME
needs_ranks = pytest.mark.skipif(not REAL_RANKS.exists(), reason="needs the real GPT-2 rank file")
ODD = [
    "", " ", "\n", "  \n\n  x  ", "I'll, we've; don't\t\ttab", "a" * 300, "0123456789 ٣٤ ½ Ⅷ",
    "naïve 日本語 𝄞 zero\u200dwidth a\u0301", "\r\n \u00a0 \u3000x\x00\x7f", "ǅ ﬁ ᾳ ß \ufeff\ue000",
]  # fmt: skip


def random_texts(count):
    draws = random.Random(0)
    ranges = [(32, 127), (0x80, 0x3000), (0xE000, 0x20000), (9, 14), (32, 33)]
    for _ in range(count):
        length = draws.randrange(1, 40)
        yield "".join(chr(draws.randrange(*draws.choice(ranges))) for _ in range(length))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of bytes in another order, and a few merges of which "abc" can be made in two ways."""
    bytes_ = [bytes((byte,)) for byte in reversed(range(256))]
    pieces = [*bytes_, b"bc", b"ab", b"abc", b" a", b"abcabc", "é".encode()]
    text = b"\n".join(base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(pieces))
    path = tmp_path_factory.mktemp("ranks") / RANKS_NAME
    path.write_bytes(text)
    tokenizer = GPT2Tokenizer(path, sha256=hashlib.sha256(text).hexdigest())
    tokenizer.vocab_size = len(pieces)
    return tokenizer


def disagreements(tokenizer, texts):
    library = library_tokenizer(tokenizer)
    return [
        text
        for text in texts
        if library.encode(text).ids != tokenizer.encode(text)
        or library.decode(tokenizer.encode(text)) != text
    ]


def test_a_few_merges_are_recovered_from_their_ranks(small):
    ranks = {small.decode_bytes([index]): index for index in range(small.vocab_size)}
    assert list(merges(ranks)) == [
        (b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b" ", b"a"), (b"abc", b"abc"), (b"\xc3", b"\xa9"),
    ]  # fmt: skip


def test_a_small_tokenizer_encodes_as_tiktoken_does(small):
    texts = [*ODD, "abcabc", "abab abcb", "bcabc éé", *random_texts(200)]
    assert disagreements(small, texts) == []


def test_bytes_are_encoded_as_bytes():
    assert disagreements(ByteTokenizer(), [*ODD, *random_texts(200)]) == []


@needs_ranks
def test_gpt2_encodes_as_tiktoken_does():
    assert disagreements(GPT2Tokenizer(REAL_RANKS), [*ODD, *random_texts(2000)]) == []


def test_the_end_of_text_keeps_its_id():
    assert library_tokenizer(ByteTokenizer()).encode("a<|endoftext|>b").ids == [97, 256, 98]


def test_every_byte_has_a_letter_of_its_own():
    letters = alphabet()
    assert len(set(letters)) == 256
    assert (letters[ord("A")], letters[ord(" ")], letters[ord("\n")]) == ("A", "Ġ", "Ċ")
