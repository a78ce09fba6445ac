import base64
import hashlib
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sabrage.data.tokenizer import RANKS_NAME, ByteTokenizer, GPT2Tokenizer, folder_tokenizer, load_encoding
from sabrage.parts import DataError

REAL_RANKS = Path(__file__).parents[3] / "shared" / "corpus" / RANKS_NAME
needs_ranks = pytest.mark.skipif(not REAL_RANKS.exists(), reason="needs the real GPT-2 rank file")
quick = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture(scope="module")
def tiny_ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / RANKS_NAME
    pieces = [*(bytes((byte,)) for byte in range(256)), b"he", b"ll", b"hell", b"hello"]
    lines = (base64.b64encode(piece) + b" " + str(rank).encode() for rank, piece in enumerate(pieces))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module")
def tiny(tiny_ranks):
    return GPT2Tokenizer(tiny_ranks, sha256=hashlib.sha256(tiny_ranks.read_bytes()).hexdigest())


def test_a_rank_file_gives_its_merges(tiny):
    assert tiny.encode("hello") == [259]
    assert tiny.decode([259, 33]) == "hello!"


@quick
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_gpt2_decoding_undoes_encoding(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


@quick
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_decoding_undoes_encoding(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["tiny", "bytes"])
def test_a_character_cut_short_is_tolerated(tiny, name):
    tokenizer = tiny if name == "tiny" else ByteTokenizer()
    cut = tokenizer.encode("a€")[:-1]
    assert tokenizer.decode(cut) == "a\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode_bytes(cut) == b"a\xe2\x82"


@pytest.mark.parametrize("name", ["tiny", "bytes"])
def test_the_end_of_text_is_shown_but_never_read(tiny, name):
    tokenizer = tiny if name == "tiny" else ByteTokenizer()
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")


def test_half_a_surrogate_pair_is_encoded_as_something():
    assert ByteTokenizer().encode("a\ud800") == [97, 63]


def test_a_rank_file_that_is_not_gpt2s_is_refused(tiny_ranks):
    with pytest.raises(DataError, match=r"gpt2\.tiktoken: not the GPT-2 ranks: sha256 .*expected 306cd27f"):
        GPT2Tokenizer(tiny_ranks)


def test_a_missing_rank_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such rank file"):
        GPT2Tokenizer(tmp_path / "absent")


def test_a_failed_download_names_the_way_out(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    load_encoding.cache_clear()
    with pytest.raises(DataError, match=r"no network.*--ranks FILE"):
        GPT2Tokenizer().encode("a")


def test_a_tokenizer_travels_to_another_process(tiny):
    assert pickle.loads(pickle.dumps(tiny)).encode("hello") == [259]


def test_a_folder_brings_its_own_ranks(tmp_path, tiny_ranks):
    assert folder_tokenizer(tmp_path).ranks is None
    (tmp_path / RANKS_NAME).write_bytes(tiny_ranks.read_bytes())
    with pytest.raises(DataError, match="not the GPT-2 ranks"):
        folder_tokenizer(tmp_path)


@needs_ranks
def test_the_real_ranks_give_the_published_tokens():
    tokenizer = GPT2Tokenizer(REAL_RANKS)
    assert tokenizer.encode("Hello world, it's") == [15496, 995, 11, 340, 338]
    assert tokenizer.encoding.n_vocab == tokenizer.vocab_size == 50257
    assert tokenizer.decode([50256]) == "<|endoftext|>"
