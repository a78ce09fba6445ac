"""Tokenizers: the GPT-2 byte-pair encoding (Radford et al. 2019) through tiktoken, and plain bytes.

GPT-2: 50,256 ranked byte strings and `<|endoftext|>` = 50,256. Bytes: 256 of them and end of text = 256.
Neither reads `<|endoftext|>` out of text: a document that spells it gets ordinary tokens.
"""

import base64
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sabrage.parts import DataError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
RANKS_NAME = "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# How GPT-2 cuts text before merging; possessive quantifiers change the speed, not the cuts.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@lru_cache
def load_encoding(ranks: Path | None) -> "tiktoken.Encoding":
    """GPT-2's encoding from a rank file, or downloaded. Raises DataError when the download fails."""
    import tiktoken

    if ranks is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise DataError(
                f"the GPT-2 ranks could not be downloaded ({type(error).__name__}: {error}); pass a local "
                f"{RANKS_NAME} with --ranks FILE, or put it into the data folder"
            ) from error
    pairs = (line.split() for line in ranks.read_bytes().splitlines() if line)
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
        special_tokens={END_OF_TEXT: GPT2Tokenizer.end_of_text},
    )


class GPT2Tokenizer:
    """GPT-2's encoding, from a local rank file or, without one, from tiktoken's own download.

    The rank file is checked at once, the encoding is built at first use. Raises DataError for a rank file
    that is missing or not GPT-2's, and at first use when the download fails.
    """

    vocab_size = 50257
    end_of_text = 50256

    def __init__(self, ranks: Path | None = None, *, sha256: str = RANKS_SHA256) -> None:
        self.ranks = ranks
        if ranks is None:
            return
        if not ranks.is_file():
            raise DataError(
                f"{ranks}: no such rank file; pass the path of {RANKS_NAME}, or none to download it"
            )
        found = hashlib.sha256(ranks.read_bytes()).hexdigest()
        if found != sha256:
            raise DataError(
                f"{ranks}: not the GPT-2 ranks: sha256 {found[:16]}..., expected {sha256[:16]}...; pass an "
                f"unchanged {RANKS_NAME}"
            )

    @property
    def encoding(self) -> "tiktoken.Encoding":
        """The tiktoken encoding, built or downloaded once a process."""
        return load_encoding(self.ranks)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; none of them is the end of text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens; a character cut short becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The exact bytes of the tokens; the end of text is spelled out."""
        return self.encoding.decode_bytes([int(token) for token in tokens])


class ByteTokenizer:
    """One token a byte of UTF-8."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of the text; none of them is the end of text."""
        return list(text.encode(errors="replace"))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens; a character cut short becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The exact bytes of the tokens; the end of text is spelled out."""
        pieces = (
            END_OF_TEXT.encode() if token == self.end_of_text else bytes((int(token),)) for token in tokens
        )
        return b"".join(pieces)


def folder_tokenizer(folder: Path) -> GPT2Tokenizer:
    """GPT-2's tokenizer, from the folder's own `gpt2.tiktoken` where it holds one."""
    ranks = folder / RANKS_NAME
    return GPT2Tokenizer(ranks if ranks.exists() else None)
