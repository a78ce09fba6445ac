"""Our tokenizers in the format of the `tokenizers` library: byte-level BPE (Radford et al. 2019).

Ranks hold no merges, but give them back: a token's last merge joins the two pieces that the byte strings of
lower rank make of it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from sabrage.config import ConfigError
from sabrage.data.tokenizer import END_OF_TEXT
from sabrage.parts import Tokenizer


def library_tokenizer(tokenizer: Tokenizer) -> Any:
    """A `tokenizers.Tokenizer` with the same ids. Unlike ours it reads `<|endoftext|>` out of text.

    Raises ConfigError where the library is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("an export needs tokenizers; install it: pip install 'sabrage[hf]'") from error
    ids = [index for index in range(tokenizer.vocab_size) if index != tokenizer.end_of_text]
    ranks = {tokenizer.decode_bytes([index]): index for index in ids}
    letters = alphabet()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()}
            | {END_OF_TEXT: tokenizer.end_of_text},
            merges=[(spell(left), spell(right)) for left, right in merges(ranks)],
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT])
    return made


def alphabet() -> list[str]:
    """The printable character that stands for each byte: itself, or the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that are merged, in the order of the ranks, one for each token of several bytes."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = [token[index : index + 1] for index in range(len(token))]
        while len(pieces) > 2:
            joined = [ranks.get(a + b, rank) for a, b in pairwise(pieces)]
            least = min(joined)
            assert least < rank, f"no tokens of lower rank make up {token!r}"
            at = joined.index(least)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        if len(pieces) == 2:
            yield pieces[0], pieces[1]
