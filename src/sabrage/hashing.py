"""Rows of a table by a hash, with signs ("the hashing trick", Chen et al. 2015, arXiv 1504.04788), and tokens
as digits that a cache of any format keeps exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Odd numbers of 64 bits, written as the negative ones that they are in two's complement.
GOLDEN, MIXER = 0x9E3779B97F4A7C15 - 2**64, 0xFF51AFD7ED558CCD - 2**64
# Tokens are cached as two digits of this many values.
DIGIT = 256


def salts(width: int) -> Tensor:
    """Numbers of 64 bits, made beforehand: in a compiled kernel an index has 32 and so would the product."""
    return GOLDEN * torch.arange(1, 1 + width)


def signed_row(hash_BT: Tensor, table_RX: Tensor, salts_X: Tensor) -> Tensor:
    """(B, T, X): the row of each hash with the signs that the hash draws."""
    negative_BTX = scramble(hash_BT[..., None] + salts_X) < 0
    row_BTX = F.embedding(hash_BT % len(table_RX), table_RX)
    return torch.where(negative_BTX, -row_BTX, row_BTX)


def scramble(x: Tensor) -> Tensor:
    """int64 to int64, one to one, every bit of the result depending on all (the finaliser of MurmurHash3)."""
    for _ in range(2):
        x = fold(x) * MIXER
    return fold(x)


def fold(x: Tensor) -> Tensor:
    """x with its upper bits laid over the lower; torch's own shift would copy the sign into them."""
    return x ^ ((x >> 33) & (2**31 - 1))


def digits(tokens_BT: Tensor) -> Tensor:
    """(B, T, 2): two digits are exact in a cache of any format, and no token is 0."""
    return torch.stack(((tokens_BT + 1) // DIGIT, (tokens_BT + 1) % DIGIT), -1).float()


def number(digits_BT2: Tensor) -> Tensor:
    """The number with these digits: one more than a token, and 0 where there is none."""
    whole_BT2 = digits_BT2.long()
    return whole_BT2[..., 0] * DIGIT + whole_BT2[..., 1]
