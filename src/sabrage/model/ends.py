"""The two ends of the model: token table in, linear head and cross-entropy out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.config import Part
from sabrage.context import Context
from sabrage.kernels.cross_entropy import bounded
from sabrage.linear import Linear
from sabrage.norms import rms_norm
from sabrage.parts import Embedding, Head

# Matrix units want row counts that are multiples of this; the product is padded, never the distribution.
PRODUCT_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class TokenTable(Embedding):
    """One learned vector a token, initialised like a torch Linear of the head's shape, times `init_scale`.

    `normalise` gives every vector unit root mean square on the way in (modded-nanogpt); a tied head still
    reads the table as it is.
    """

    normalise: bool = False
    init_scale: float = 1.0

    def problems(self) -> list[str]:
        return [] if self.init_scale > 0 else [f"init_scale={self.init_scale} must be above 0"]

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return TokenEmbedding(self, dim=dim, vocab_size=vocab_size)


class TokenEmbedding(nn.Module):
    """forward(tokens_BT, context) -> x_BTD."""

    def __init__(self, part: TokenTable | None = None, *, dim: int, vocab_size: int) -> None:
        super().__init__()
        part = part or TokenTable()
        self.normalise = part.normalise
        self.weight = nn.Linear(dim, vocab_size, bias=False).weight
        with torch.no_grad():
            self.weight.mul_(part.init_scale)

    def forward(self, tokens_BT: Tensor, context: Context) -> Tensor:
        x_BTD = F.embedding(tokens_BT, self.weight)
        return rms_norm(x_BTD) if self.normalise else x_BTD


@dataclass(frozen=True, kw_only=True)
class Rescale(Part):
    """Logits bounded by z = height sigmoid((x + shift) / width), from 0 to `height`.

    A soft-cap that lets the unlikely sink further than the likely may rise; the defaults are those of
    modded-nanogpt.
    """

    height: float = 23.0
    shift: float = 5.0
    width: float = 7.5

    def problems(self) -> list[str]:
        return [
            f"{name}={getattr(self, name)} must be above 0"
            for name in ("height", "width")
            if getattr(self, name) <= 0
        ]

    def values(self) -> tuple[float, float, float]:
        return self.height, self.shift, self.width


@dataclass(frozen=True, kw_only=True)
class TableHead(Head):
    """logits = h W^T; with `tied` W is the embedding's table (Press and Wolf 2016, arXiv 1608.05859).

    `zero_init` starts an untied W at zero, so that the first loss is that of a uniform guess. `softcap` c
    bounds the logits by z = c tanh(x / c) (Gemma 2, arXiv 2408.00118), `rescale` by another curve.
    """

    zero_init: bool = False
    softcap: float | None = None
    rescale: Rescale | None = None

    def problems(self) -> list[str]:
        found = []
        if self.tied + self.copied + self.zero_init > 1:
            found.append(
                f"tied={self.tied}, copied={self.copied} and zero_init={self.zero_init} each say what the "
                "head's table is at first; set at most one of them"
            )
        if self.softcap is not None and self.softcap <= 0:
            found.append(f"softcap={self.softcap} must be above 0, or none")
        if self.softcap is not None and self.rescale is not None:
            found.append("softcap and rescale both bound the logits; set one of them to null")
        return found

    def flops(self, dim: int, vocab_size: int, *, training: bool = False) -> int:
        return 2 * dim * vocab_size


@dataclass(frozen=True, kw_only=True)
class LinearHead(TableHead):
    """The plain head."""

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return Projection(self, dim=dim, vocab_size=vocab_size)


class Projection(Linear):
    """The module of `LinearHead`."""

    def __init__(self, part: TableHead | None = None, *, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size)
        part = part or LinearHead()
        self.softcap, self.rescale = part.softcap, part.rescale.values() if part.rescale else None
        if part.zero_init:
            nn.init.zeros_(self.weight)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Logits over the vocabulary, (..., V); bounded ones in fp32."""
        logits_BTV = self.padded(h_BTD, PRODUCT_MULTIPLE if h_BTD.is_cuda else 1)
        if self.softcap or self.rescale:
            return bounded(logits_BTV.float(), self.softcap, self.rescale)
        return logits_BTV

    def padded(self, h_BTD: Tensor, multiple: int) -> Tensor:
        """The product, made with rows of zeros added up to a multiple and taken off again."""
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
