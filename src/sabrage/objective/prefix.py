"""The longest vocabulary prefix of the next token as a second target.

    loss = weight_1 * CE(p, v) + weight_2 * CE(p, prefix(v)),    p = softmax(head(h_t)), v = token t + 1

prefix(v) is the longest other token whose bytes begin v's: " hello" gets " hell". A token without one, such
as a single byte, has the first term alone. One pass of the head; the second weight is to fall to zero within
the run, since what is learned with it is not the distribution of the next token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sabrage.losses import Loss, Objective
from sabrage.objective.targets import score_together
from sabrage.parts import Batch, DataError, Tokenizer


@dataclass(frozen=True, kw_only=True)
class PrefixTarget(Objective):
    """Takes two loss weights, the next token's and its prefix's. Needs data with a known tokenizer."""

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return PrefixTargetLoss(vocab_size)

    def num_weights(self) -> int:
        return 2

    def read(self, module: nn.Module, tokenizer: Tokenizer | None) -> None:
        """Computes the table of prefixes; the end of text is no text, so it has and is none."""
        assert isinstance(module, PrefixTargetLoss)
        if tokenizer is None:
            raise DataError(
                "the objective PrefixTarget needs the bytes of every token and this data names no tokenizer; "
                "use data of the GPT-2 vocabulary or of bytes, or another objective"
            )
        pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        pieces[tokenizer.end_of_text] = b""
        module.prefix_V[: len(pieces)] = torch.tensor(longest_prefixes(pieces))


def longest_prefixes(pieces: Sequence[bytes]) -> list[int]:
    """For each byte string the index of the longest other one that it begins with, -1 where there is none."""
    indices = {piece: index for index, piece in enumerate(pieces) if piece}
    return [
        next((indices[piece[:end]] for end in range(len(piece) - 1, 0, -1) if piece[:end] in indices), -1)
        for piece in pieces
    ]


class PrefixTargetLoss(nn.Module):
    """The module of `PrefixTarget`; the table is not saved with the weights, since `read` computes it."""

    prefix_V: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("prefix_V", torch.full((vocab_size,), -1), persistent=False)

    def forward(self, h_BTD: Tensor, batch: Batch, model: Any, loss_weights_W: Tensor | None) -> Loss:
        next_BT = batch.targets_BT
        prefix_BT = self.prefix_V[next_BT.clamp(min=0)].masked_fill(next_BT < 0, -1)
        return score_together(
            h_BTD, {"loss_ahead_1": next_BT, "loss_prefix": prefix_BT}, model, loss_weights_W
        )
