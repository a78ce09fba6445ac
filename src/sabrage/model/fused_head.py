"""A head whose cross-entropy never holds all logits at once; see `sabrage.kernels.cross_entropy`."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn

from sabrage.kernels.backend import KernelBackend, choose_kernel, kernel_refusal
from sabrage.kernels.cross_entropy import CHUNK_TOKENS, cross_entropy_head, cross_entropy_head_reference
from sabrage.kernels.sampled_columns import sizes_of
from sabrage.model.ends import Projection, TableHead
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class FusedHead(TableHead):
    """`LinearHead` with the loss in chunks of tokens: equal up to rounding, in a fraction of the memory.

    `fp8` runs the logits and the hidden gradient as FP8 products, in training only: a scale taken from a
    whole tensor lets every token see a little of all others.

    `columns` (0: all) samples the vocabulary, in training only: the softmax runs over that many tokens, all
    targets of the micro-batch and a sample of the others, weighed so that the sum of exponentials is unbiased
    (Bengio and Senecal 2008, IEEE Trans. Neural Networks 19(4); see `sabrage.kernels.sampled_columns`). The
    training loss is then an estimate, its expectation slightly below the exact loss, and every token's
    depends on the other targets of its micro-batch. Evaluation is exact. From the size of the vocabulary on
    it is the plain head. Each stretch of `sample_tokens` tokens (0: the micro-batch) draws columns of its
    own: it has fewer targets, so that more of the columns are a sample, and the samples of a step differ.
    The `proposal` is uniform, or in proportion to the roots of the "counts" of all targets so far.
    """

    # That of the kernel; the reference holds all.
    logit_tokens = CHUNK_TOKENS
    fp8: bool = False
    columns: int = 0
    sample_tokens: int = 0
    proposal: Literal["uniform", "counts"] = "uniform"
    backend: KernelBackend = "auto"

    def problems(self) -> list[str]:
        found = super().problems()
        for name, whole in (("columns", "vocabulary"), ("sample_tokens", "micro-batch")):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must be 0, for the whole {whole}, or above")
        if self.proposal == "counts" and not self.columns:
            found.append("proposal='counts' is for a sample and columns=0 is none; set columns, or 'uniform'")
        return found

    def flops(self, dim: int, vocab_size: int, *, training: bool = False) -> int:
        columns = self.columns if training and self.columns else vocab_size
        return 2 * dim * min(columns, vocab_size)

    def refusal(self, facts: DeviceFacts) -> str | None:
        if self.fp8 and not (facts.has_fp8 and choose_kernel(self.backend, facts) == "triton"):
            return (
                f"an FP8 head needs compute capability 8.9 and its Triton kernel, and this is {facts.name} "
                f"with backend {self.backend!r}; set model.head.fp8=false"
            )
        return kernel_refusal(self.backend, facts)

    def resolve(self, facts: DeviceFacts) -> Self:
        return replace(self, backend=choose_kernel(self.backend, facts))

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return FusedProjection(self, dim=dim, vocab_size=vocab_size)


class FusedProjection(Projection):
    """The module of `FusedHead`; its loss reads the weight itself."""

    replaceable = False
    counts_V: Tensor | None

    def __init__(self, part: FusedHead, *, dim: int, vocab_size: int) -> None:
        super().__init__(part, dim=dim, vocab_size=vocab_size)
        self.fp8, self.fused, self.columns = part.fp8, part.backend == "triton", part.columns
        self.sample_tokens = part.sample_tokens
        # How often each token has been a target; in the checkpoint, since a run that resumes goes on with it.
        # On a device of its own choice: a tied head is built where nothing is real.
        counts_V = (
            torch.zeros(vocab_size, dtype=torch.int64, device="cpu") if part.proposal == "counts" else None
        )
        self.register_buffer("counts_V", counts_V)

    def loss(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not -1."""
        total, _ = self.losses(h_BTD, targets_BT[..., None], None)
        return total

    def losses(self, h_BTD: Tensor, targets_BTW: Tensor, weights_W: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weighted total, mean loss of each of the W target sets), for objectives with several targets."""
        h_ND, targets_NW = h_BTD.flatten(0, -2), targets_BTW.flatten(0, -2)
        columns = self.columns if self.training else 0
        sizes_V = self.sizes(targets_NW) if columns and self.counts_V is not None else None
        compute = cross_entropy_head_reference
        if self.fused:
            compute = partial(cross_entropy_head, fp8=self.fp8 and self.training)
        return compute(
            h_ND,
            self.weight,
            targets_NW,
            weights_W=weights_W,
            softcap=self.softcap,
            rescale=self.rescale,
            columns=columns,
            sample_tokens=self.sample_tokens,
            sizes_V=sizes_V,
        )

    @torch.no_grad()
    def sizes(self, targets_NW: Tensor) -> Tensor:
        """(V,) fp64: what tokens are drawn by, these targets counted as well."""
        assert self.counts_V is not None
        targets_M = targets_NW.flatten()
        is_token_M = (targets_M >= 0) & (targets_M < len(self.counts_V))
        self.counts_V.index_add_(0, torch.where(is_token_M, targets_M, 0), is_token_M.long())
        return sizes_of(self.counts_V)
