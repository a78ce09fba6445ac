"""What becomes of a head's output before the projection: a gate, and the token's own value taken out.

The gate: y_th <- y_th 2 sigmoid(w_h . x_t[:12]), x the mixer's input, one w for each head. From
modded-nanogpt (pull request 117); Qiu et al. 2025 (arXiv 2505.06708) read all of x. A gate of w = 0 is 1.

Exclusive self-attention (Zhai 2026, arXiv 2603.09078): y_th <- y_th - (y_th . v_th / |v_th|^2) v_th. What the
output says of the token's own value the residual stream knows already; attention is left to tell of others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# A value shorter than the root of this has no direction to speak of, and one of zeros leaves all as it is.
SMALLEST = 1e-12


def gated(y_BTHK: Tensor, x_BTD: Tensor, gate_HX: Tensor) -> Tensor:
    """Each head's output times its gate, in the dtype of y; X numbers of x are read."""
    opened_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., : gate_HX.shape[1]], gate_HX))
    return y_BTHK * opened_BTH[..., None].to(y_BTHK.dtype)


def exclusive(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """The outputs without their parts along the tokens' own values, in fp32 and back in the dtype of y.

    G divides H, and head h has attended to the values of head h // (H / G).
    """
    y_BTGJK = y_BTHK.float().unflatten(2, (v_BTGK.shape[2], -1))
    v_BTG1K = v_BTGK.float().unsqueeze(3)
    length = v_BTG1K.square().sum(-1, keepdim=True).clamp(min=SMALLEST).rsqrt()
    direction = v_BTG1K * length
    along = (y_BTGJK * direction).sum(-1, keepdim=True)
    return (y_BTGJK - along * direction).flatten(2, 3).to(y_BTHK.dtype)
