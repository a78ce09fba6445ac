"""The two ends of the model: token table in, linear head and cross-entropy out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.linear import Linear
from sabrage.parts import Embedding, Head

# Matrix units want row counts that are multiples of this; the product is padded, never the distribution.
PRODUCT_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class TokenTable(Embedding):
    """One learned vector a token, initialised like a torch Linear of the head's shape."""

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return TokenEmbedding(dim=dim, vocab_size=vocab_size)


class TokenEmbedding(nn.Module):
    """forward(tokens_BT, context) -> x_BTD."""

    def __init__(self, *, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, vocab_size, bias=False).weight

    def forward(self, tokens_BT: Tensor, context: Context) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


@dataclass(frozen=True, kw_only=True)
class LinearHead(Head):
    """logits = h W^T; with `tied` W is the embedding's table (Press and Wolf 2016, arXiv 1608.05859)."""

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return Projection(dim=dim, vocab_size=vocab_size)

    def flops(self, dim: int, vocab_size: int) -> int:
        return 2 * dim * vocab_size


class Projection(Linear):
    """The module of `LinearHead`."""

    def __init__(self, *, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Logits over the vocabulary, (..., V)."""
        return self.padded(h_BTD, PRODUCT_MULTIPLE if h_BTD.is_cuda else 1)

    def padded(self, h_BTD: Tensor, multiple: int) -> Tensor:
        """The logits, by a product with rows of zeros added up to a multiple and taken off again."""
        vocab_size = self.weight.shape[0]
        extra = -vocab_size % multiple
        weight_VD = F.pad(self.weight, (0, 0, 0, extra)) if extra else self.weight
        return self.multiply(h_BTD, weight_VD)[..., :vocab_size]

    def loss(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not -1, softmax in fp32."""
        logits_NV = self(h_BTD).flatten(0, -2)
        return F.cross_entropy(logits_NV.float(), targets_BT.flatten(), ignore_index=-1)

    def losses(self, h_BTD: Tensor, targets_BTW: Tensor, weights_W: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weighted total, mean loss of each of the W target sets), for objectives with several targets."""
        log_NV = self(h_BTD).flatten(0, -2).float().log_softmax(-1)
        losses_W = torch.stack(
            [
                F.nll_loss(log_NV, targets_N, ignore_index=-1, reduction="sum")
                / (targets_N >= 0).sum().clamp(min=1)
                for targets_N in targets_BTW.flatten(0, -2).unbind(1)
            ]
        )
        weights_W = torch.ones_like(losses_W) if weights_W is None else weights_W
        return (weights_W * losses_W).sum(), losses_W.detach()
