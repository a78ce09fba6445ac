"""Orthogonalisation by matrix products alone: for G = U S V^T, an approximation of U V^T.

An odd polynomial of a matrix acts on its singular values and leaves U and V alone, so a few rounds of

    X <- a X + (b A + c A^2) X,  A = X X^T,        which is  s <- a s + b s^3 + c s^5  for each s,

started at X = G / |G|_F (all s at most 1), bring every singular value near 1. Wide matrices only: a tall one
is transposed first, since A is square in the number of rows. One round of an (M, N) matrix, M <= N, costs
4 M^2 N + 2 M^3 FLOPs.

Shapes: X any leading dimensions (or none), M rows, N columns.
"""

import torch
from torch import Tensor

from sabrage.kernels.symmetric_product import symmetric_product, symmetric_product_reference

Quintic = tuple[float, float, float]

# Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024): steepest at zero, and
# therefore never settles at 1.
JORDAN: Quintic = (3.4445, -4.7750, 2.0315)

# Amsel, Persson, Musco and Gower, "The Polar Express" (2025, arXiv 2505.16932), Algorithm 1: round t is the
# best quintic for the interval that round t-1 left, the first interval being [0.001, 1].
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

# The paper's margin against singular values that rounding lifts above the interval; the last needs none.
SAFETY = 1.01

# NorMuon's guard against rows and columns that never got a gradient.
EVEN_EPS = 1e-8


def polar_express_coefficients(steps: int) -> tuple[Quintic, ...]:
    """(a, b, c) of each round, with the safety factor; beyond the table the last one repeats."""
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return tuple((safe + [POLAR_EXPRESS[-1]] * max(steps - len(safe), 0))[:steps])


def newton_schulz(
    g_XMN: Tensor, *, steps: int = 5, dtype: torch.dtype | None = None, halves: bool = False
) -> Tensor:
    """Keller Jordan's quintic, `steps` times; the result has the shape of `g_XMN` and the type `dtype`.

    After 5 steps every singular value that was at least 0.002 of the Frobenius norm lies in [0.68, 1.21];
    smaller ones end lower and zero stays zero. `dtype` is what the products are computed in: bfloat16 on
    CUDA and float32 elsewhere unless given. With `halves` the two symmetric products of a round come from a
    Triton kernel that multiplies half of each.
    """
    return _iterate(g_XMN, (JORDAN,) * steps, headroom=1.0, dtype=dtype, halves=halves)


def polar_express(
    g_XMN: Tensor, *, steps: int = 5, dtype: torch.dtype | None = None, halves: bool = False
) -> Tensor:
    """The Polar Express, `steps` rounds; shape, type, `dtype` and `halves` as in `newton_schulz`.

    After 5 steps every singular value that was at least 0.002 of the Frobenius norm lies in [0.87, 1.13],
    after 6 in [0.99, 1.01]; smaller ones end lower and zero stays zero.
    """
    return _iterate(g_XMN, polar_express_coefficients(steps), headroom=SAFETY, dtype=dtype, halves=halves)


def _iterate(
    g_XMN: Tensor,
    coefficients: tuple[Quintic, ...],
    *,
    headroom: float,
    dtype: torch.dtype | None,
    halves: bool,
) -> Tensor:
    multiply = symmetric_product if halves else symmetric_product_reference
    if dtype is None:
        dtype = torch.bfloat16 if g_XMN.is_cuda else torch.float32
    rows, columns = g_XMN.shape[-2:]
    g_SMN = g_XMN.reshape(-1, rows, columns)
    norm_S11 = torch.linalg.vector_norm(g_SMN, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    # The floor keeps a matrix of zeros at zero instead of 0 / 0.
    x_SMN = (g_SMN / (norm_S11 * headroom).clamp(min=1e-7)).to(dtype)
    if rows > columns:
        x_SMN = x_SMN.mT
    for a, b, c in coefficients:
        gram_SMM = multiply(x_SMN)
        polynomial_SMM = multiply(gram_SMM, gram_SMM, alpha=c, beta=b)
        x_SMN = torch.baddbmm(x_SMN, polynomial_SMM, x_SMN, beta=a)
    if rows > columns:
        x_SMN = x_SMN.mT
    return x_SMN.reshape(g_XMN.shape)


def evened(u_SMN: Tensor, variance_SIJ: Tensor, *, decay: float) -> Tensor:
    """NorMuon: `u_SMN` with every row, or column, over its root second moment, at unchanged norm per matrix.

    `variance_SIJ` is the running second moment; it is brought up to date first, in place.
    """
    along = -1 if variance_SIJ.shape[-1] == 1 else -2
    variance_SIJ.lerp_(u_SMN.square().mean(dim=along, keepdim=True), 1 - decay)
    even_SMN = u_SMN / (variance_SIJ.sqrt() + EVEN_EPS)
    norm_S11, even_norm_S11 = (
        torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True) for matrices in (u_SMN, even_SMN)
    )
    return even_SMN * (norm_S11 / even_norm_S11.clamp(min=EVEN_EPS))
