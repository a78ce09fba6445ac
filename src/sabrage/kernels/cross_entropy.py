"""The cross-entropy head: linear layer, bounded logits and cross-entropy against several targets, in chunks.

With z = bounded(h W^T) over the real vocabulary and n_w the targets of set w not -1,

    total = sum_w weight_w * (1 / n_w) * sum_n (logsumexp(z_n) - z_n[target_nw])

A row's gradient needs only that row: (softmax(z) sum_w c_nw - sum_w c_nw onehot(target_nw))
times the bound's derivative, with c_nw = weight_w / n_w. So the forward pass takes a chunk of tokens at a
time, makes its logits, overwrites them with their gradient and multiplies that into the gradients of h and W
at once: one chunk of logits is all that ever exists. The backward pass only scales. The idea is that of Liger
Kernel (Hsu et al. 2024, arXiv 2410.10989); several sets at once serve multi-token prediction. Gradients are
held times a power of two near N until the end, in the range of fp16 and fp8. Where the vocabulary is
sampled (`sabrage.kernels.sampled_columns`) all this is done over a few rows of W, some counted several times.

A bound is a sigmoid, z = height sigmoid((x + shift) / width), dz / dx = z (1 - z / height) / width. Up to a
constant, which no probability sees, the soft-cap z = c tanh(x / c) is the one of (2 c, 0, c / 2).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.kernels.cross_entropy_rows import BLOCK, LOW_HEIGHT, NUM_WARPS, rows
from sabrage.kernels.head_products import Products, accumulated, products_by_sample
from sabrage.kernels.language import KernelError, require
from sabrage.kernels.sampled_columns import Sample, samples

# So many tokens' logits are held at once, over the whole vocabulary: 0.8 GB in 16 bits.
CHUNK_TOKENS = 8192


def bounded(x_X: Tensor, softcap: float | None, rescale: tuple[float, float, float] | None) -> Tensor:
    """The logits x, bounded by a soft-cap or a rescale (height, shift, width), or as they are."""
    if rescale:
        height, shift, width = rescale
        return height * torch.sigmoid((x_X + shift) / width)
    return softcap * torch.tanh(x_X / softcap) if softcap else x_X


def cross_entropy_head_reference(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_NW: Tensor,
    *,
    weights_W: Tensor | None = None,
    softcap: float | None = None,
    rescale: tuple[float, float, float] | None = None,
    num_real: int | None = None,
    columns: int = 0,
    sample_tokens: int = 0,
    sizes_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: all logits of the columns at once, softmax in fp32 or wider."""
    num_real = num_real or weight_VD.shape[0]
    drawn = samples(targets_NW, num_real=num_real, num_columns=columns, tokens=sample_tokens, sizes_V=sizes_V)
    sums = []
    for sample in drawn:
        weight_KD, real = (
            (weight_VD, num_real) if sample.ids_K is None else (weight_VD[sample.ids_K], columns)
        )
        raw_MK = F.linear(h_ND[sample.part], weight_KD.to(h_ND.dtype))[:, :real]
        z_MK = bounded(raw_MK.to(torch.promote_types(h_ND.dtype, torch.float32)), softcap, rescale)
        if sample.bits_K is not None:
            z_MK = z_MK + math.log(2) * sample.bits_K.to(z_MK.dtype)
        sets = [
            F.cross_entropy(z_MK, targets_M, ignore_index=-1, reduction="sum")
            for targets_M in sample.targets_MW.unbind(1)
        ]
        sums.append(torch.stack(sets))
    losses_W = torch.stack(sums).sum(0) / target_counts(drawn)
    weights_W = torch.ones_like(losses_W) if weights_W is None else weights_W
    return (weights_W.to(losses_W.dtype) * losses_W).sum(), losses_W.detach()


def cross_entropy_head(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_NW: Tensor,
    *,
    weights_W: Tensor | None = None,
    softcap: float | None = None,
    rescale: tuple[float, float, float] | None = None,
    num_real: int | None = None,
    columns: int = 0,
    sample_tokens: int = 0,
    sizes_V: Tensor | None = None,
    fp8: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """(weighted total, mean loss of each target set), fp32, in nats; only the total carries gradient.

    `targets_NW` holds W targets for every token, -1 for none; a set without any target counts 0, a target
    at or beyond `num_real` gives NaN. `weights_W` (default ones) has no gradient. Rows of `weight_VD` from
    `num_real` on are padding: probability 0, gradient 0. Products run in the dtype of h (of autocast, where
    it is on); the gradient of the weight is summed in fp32 and returned in the weight's dtype. With `fp8` the
    logits (e4m3) and the gradient of h (e5m2) are FP8 products, the weight's gradient is not; D must then be
    a multiple of 16. With `columns` below `num_real` (0: all) the softmax runs over that many tokens, the
    targets and a sample of the others (`choose_columns`): the loss is an estimate, and each row's depends on
    the targets of all rows, or of the `sample_tokens` rows that draw with it (0: all). Others are drawn by
    their `sizes_V` (fp64, by default equal). No more logits are held at once than `chunk_tokens` tokens have
    of the whole vocabulary. Raises KernelError for what it cannot take.
    """
    num_real = weight_VD.shape[0] if num_real is None else num_real
    _check(h_ND, weight_VD, targets_NW, num_real, columns, sample_tokens, fp8, chunk_tokens)
    if sizes_V is not None and (sizes_V.dtype != torch.float64 or len(sizes_V) < num_real):
        raise KernelError(
            f"sizes_V is {sizes_V.dtype} {tuple(sizes_V.shape)}; allowed: torch.float64 ({num_real},)"
        )
    if torch.is_autocast_enabled(h_ND.device.type):
        h_ND = h_ND.to(torch.get_autocast_dtype(h_ND.device.type))
    if weights_W is None:
        weights_W = torch.ones(targets_NW.shape[1], device=h_ND.device)
    learns = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
    bound = rescale or ((2.0 * softcap, 0.0, softcap / 2) if softcap else (0.0, 0.0, 0.0))
    total, losses_W, _, _ = _head(
        h_ND,
        weight_VD,
        targets_NW,
        weights_W.detach().float(),
        sizes_V,
        list(bound),
        num_real,
        columns,
        sample_tokens,
        fp8,
        chunk_tokens,
        learns,
    )
    return total, losses_W


def _check(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_NW: Tensor,
    num_real: int,
    columns: int,
    sample_tokens: int,
    fp8: bool,
    chunk_tokens: int,
) -> None:
    if targets_NW.dim() != 2 or len(targets_NW) != len(h_ND) or targets_NW.dtype != torch.int64:
        raise KernelError(
            f"targets are {targets_NW.dtype} {tuple(targets_NW.shape)}; allowed: int64 ({len(h_ND)}, sets); "
            "a single set is targets_N[:, None]"
        )
    if not 0 < num_real <= weight_VD.shape[0]:
        raise KernelError(f"num_real={num_real}, allowed: 1 to the weight's {weight_VD.shape[0]} rows")
    for name, number in (("columns", columns), ("sample_tokens", sample_tokens)):
        if number < 0:
            raise KernelError(f"{name}={number}, allowed: 0 (all) and up")
    if chunk_tokens < 1:
        raise KernelError(f"chunk_tokens={chunk_tokens}, allowed: 1 and up; {CHUNK_TOKENS} is the default")
    if fp8 and h_ND.shape[1] % 16:
        raise KernelError(f"FP8 products need a width that 16 divides and got {h_ND.shape[1]}; use fp8=False")


@torch.library.custom_op("sabrage::cross_entropy_head", mutates_args=())
def _head(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_NW: Tensor,
    weights_W: Tensor,
    sizes_V: Tensor | None,
    bound: list[float],
    num_real: int,
    columns: int,
    sample_tokens: int,
    fp8: bool,
    chunk_tokens: int,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, losses_W, gradient of h, gradient of W), both times `_held(N)`, empty unless it `learns`."""
    require(h_ND.device)
    num_tokens, dim = h_ND.shape
    drawn = samples(targets_NW, num_real=num_real, num_columns=columns, tokens=sample_tokens, sizes_V=sizes_V)
    counts_W = target_counts(drawn)
    coefficients_W = weights_W * _held(num_tokens) / counts_W
    nll_NW = torch.empty(targets_NW.shape, device=h_ND.device, dtype=torch.float32)
    grad_h_ND = torch.empty((num_tokens if learns else 0, dim), device=h_ND.device, dtype=h_ND.dtype)
    # Without a sample the columns are the rows of W, and their gradient is its own.
    summed = learns and drawn[0].ids_K is not None
    grad_VD = torch.zeros((len(weight_VD) if summed else 0, dim), device=h_ND.device, dtype=torch.float32)
    products_of = products_by_sample(h_ND, weight_VD, coefficients_W, fp8)
    for sample in drawn:
        products = products_of(sample)
        own = nll_NW[sample.part], grad_h_ND[sample.part]
        grad_KD = _sample_pass(products, sample, *own, coefficients_W, num_real, bound, learns, chunk_tokens)
        if sample.ids_K is None:
            grad_VD = grad_KD[: len(weight_VD)]
        elif learns:
            # No token is drawn twice, so that the order of adding changes nothing.
            grad_VD.index_add_(0, sample.ids_K, grad_KD[: len(sample.ids_K)])
    # A sum of its own for each set: how many others there are changes no bit of it.
    losses_W = torch.stack([nll_N.contiguous().sum() for nll_N in nll_NW.unbind(1)]) / counts_W
    return (weights_W * losses_W).sum(), losses_W, grad_h_ND, grad_VD


def _sample_pass(
    products: Products,
    sample: Sample,
    nll_MW: Tensor,
    grad_h_MD: Tensor,
    coefficients_W: Tensor,
    num_real: int,
    bound: list[float],
    learns: bool,
    chunk_tokens: int,
) -> Tensor:
    """Fills nll_MW and, if it `learns`, grad_h_MD, of one sample's tokens; returns its columns' gradient."""
    h_MD = products.h_MD
    columns = num_real if sample.ids_K is None else len(sample.ids_K)
    chunk = chunk_tokens * (num_real // columns)
    grad_KD = None
    for start in range(0, len(h_MD), chunk):
        part = slice(start, start + chunk)
        logits_CV, narrow_CV = _row_pass(
            products,
            part,
            sample.targets_MW[part].contiguous(),
            coefficients_W,
            nll_MW[part],
            columns,
            bound,
            learns,
            sample.bits_K,
        )
        if learns:
            products.hidden_gradient(logits_CV, narrow_CV, grad_h_MD[part])
            grad_KD = accumulated(grad_KD, logits_CV, h_MD[part])
        # The next chunk takes this one's memory.
        del logits_CV, narrow_CV
    if grad_KD is None:
        rows_held = len(products.table_KD) if learns else 0
        grad_KD = torch.zeros((rows_held, h_MD.shape[1]), device=h_MD.device, dtype=torch.float32)
    return grad_KD


def target_counts(drawn: list[Sample]) -> Tensor:
    """How many targets each set has, at least 1, (W,)."""
    return torch.stack([(sample.targets_MW >= 0).sum(0) for sample in drawn]).sum(0).clamp(min=1)


def _row_pass(
    products: Products,
    part: slice,
    targets_CW: Tensor,
    coefficients_W: Tensor,
    nll_CW: Tensor,
    num_real: int,
    bound: list[float],
    learns: bool,
    bits_K: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fills nll_CW of a part of the tokens; returns the logits' gradient if it `learns`, and its narrow copy
    where one is wanted."""
    logits_CV = products.logits(part)
    narrow_CV = products.narrow(logits_CV) if learns else None
    sets = targets_CW.shape[1]
    rows[(len(logits_CV),)](
        logits_CV,
        logits_CV if narrow_CV is None else narrow_CV,
        targets_CW,
        coefficients_W,
        products.grad_scale,
        nll_CW,
        logits_CV if bits_K is None else bits_K,
        num_real,
        *bound,
        logits_CV.stride(0),
        SETS=sets,
        BLOCK_SETS=1 << (sets - 1).bit_length(),
        BOUNDED=bound[0] > 0,
        LOW=0 < bound[0] <= LOW_HEIGHT,
        LEARNS=learns,
        NARROW=narrow_CV is not None,
        SAMPLED=bits_K is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return logits_CV, narrow_CV


def _held(num_tokens: int) -> int:
    """What gradients are multiplied by until the end: a power of two, so that taking it back is exact."""
    return 1 << max(num_tokens - 1, 0).bit_length()


@_head.register_fake
def _(
    h_ND: Tensor, weight_VD: Tensor, targets_NW: Tensor, weights_W: Tensor, *plain: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    learns = plain[-1]
    losses_W = weights_W.new_empty(targets_NW.shape[1])
    grad_h_ND = h_ND.new_empty((h_ND.shape[0] if learns else 0, h_ND.shape[1]))
    grad_VD = weights_W.new_empty((weight_VD.shape[0] if learns else 0, weight_VD.shape[1]))
    return weights_W.new_empty(()), losses_W, grad_h_ND, grad_VD


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses_W, grad_h_ND, grad_VD = output
    ctx.save_for_backward(grad_h_ND, grad_VD)
    ctx.held, ctx.dtypes = _held(inputs[0].shape[0]), (inputs[0].dtype, inputs[1].dtype)
    ctx.mark_non_differentiable(losses_W, grad_h_ND, grad_VD)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    scale = grad / ctx.held
    pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    grad_h_ND, grad_VD = ((held.float() * scale).to(dtype) for held, dtype in pairs)
    return grad_h_ND, grad_VD, *[None] * 10


_head.register_autograd(_backward, setup_context=_save)
