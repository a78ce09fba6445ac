"""Tokens further ahead one after another, each seeing the true one before it.

DeepSeek-V3 (arXiv 2412.19437, section 2.2). With h^0_i the model's hidden state at i and t_j token j, depth
k = 1 .. n computes

    h^k_i = block_k(M_k [norm(h^(k-1)_i); norm(embedding(t_(i+k)))]),    head(h^k_i) predicts t_(i+k+1)

with the model's own embedding and head. In decoding the same modules draft tokens for the model to verify;
see `sabrage.generate.speculate`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.linear import Linear
from sabrage.losses import Loss, Objective
from sabrage.norms import rms_norm
from sabrage.objective.block import ExtraBlock
from sabrage.objective.targets import ahead, score_apart
from sabrage.parts import Batch, FeedForward, Mixer


@dataclass(frozen=True, kw_only=True)
class SequentialAhead(Objective):
    """`depth` modules of a `mixer` and a `feedforward`. Takes 1 + `depth` loss weights, next token first."""

    depth: int = 1
    mixer: Mixer
    feedforward: FeedForward

    def problems(self) -> list[str]:
        return [] if self.depth >= 1 else [f"objective.depth={self.depth} must be at least 1"]

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return SequentialAheadLoss(self, dim=dim)

    def num_weights(self) -> int:
        return 1 + self.depth

    def extra_heads(self) -> int:
        return self.depth

    def flops(self, dim: int, sequence_length: int, head: int) -> int:
        merging = 2 * 2 * dim * dim
        block = self.mixer.flops(dim, sequence_length) + self.feedforward.flops(dim)
        return self.depth * (merging + block + head)

    def draft_blocks(self) -> tuple[tuple[Mixer, FeedForward], ...]:
        return ((self.mixer, self.feedforward),) * self.depth


class MergingBlock(nn.Module):
    """forward(h_BTD, embedded_BTD, context) -> normalised h_BTD of the next depth."""

    def __init__(self, part: SequentialAhead, *, dim: int, layer: int) -> None:
        super().__init__()
        self.merge = Linear(2 * dim, dim)
        self.block = ExtraBlock(part.mixer, part.feedforward, dim=dim, layer=layer)

    def forward(self, h_BTD: Tensor, embedded_BTD: Tensor, context: Context) -> Tensor:
        merged_BTD = self.merge(torch.cat((rms_norm(h_BTD), rms_norm(embedded_BTD)), dim=-1))
        return self.block(merged_BTD, context)


class SequentialAheadLoss(nn.Module):
    """The module of `SequentialAhead`."""

    def __init__(self, part: SequentialAhead, *, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MergingBlock(part, dim=dim, layer=index) for index in range(part.depth))

    def draft(self, index: int, h_BTD: Tensor, tokens_BT: Tensor, model: Any, context: Context) -> Tensor:
        """The hidden states of depth 1 + index, from those before and the tokens 1 + index further on."""
        return self.blocks[index](h_BTD, model.embedding(tokens_BT, context), context)

    def forward(self, h_BTD: Tensor, batch: Batch, model: Any, loss_weights_W: Tensor | None) -> Loss:
        context = Context(documents_BT=batch.documents_BT)
        hidden, targets = [h_BTD], {"loss_ahead_1": batch.targets_BT}
        for index in range(len(self.blocks)):
            # Beyond the row or the document token 0 stands in: nothing that is scored sees it.
            tokens_BT = ahead(batch, 1 + index).clamp(min=0)
            hidden.append(self.draft(index, hidden[-1], tokens_BT, model, context))
            targets[f"loss_ahead_{2 + index}"] = ahead(batch, 2 + index)
        return score_apart(hidden, targets, model, loss_weights_W).plus(context.losses)
