"""The network's probabilities of candidates, raised or lowered by what is known of each.

    p'(v) = p(v) exp(a_v) / Z  for candidates,    p(v) / Z  for all other tokens
    Z = 1 - sum_C p(v) + sum_C p(v) exp(a_v)
    a_v = U gelu(W features of the place + W' features of v + b) + c    (with more layers in between, if any)

Interpolation of language models in the log domain (Klakow 1998, "Log-linear interpolation of language
models", ICSLP), with weights by context and token. What is known of a candidate depends on the context alone,
so p' is a distribution over the vocabulary; tokens that are no candidates enter Z as one sum, so it is exact
and cheap. With U = c = 0, as it begins, p' is p.

Shapes: N places, F features of a place, C candidates, X features of each, H hidden units.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.blend.candidates import Offered

# Hidden units of this many places are held at once: 0.3 GB of 64 for each of 64 candidates, three times over
# for every layer.
PLACES_AT_ONCE = 16_384


class Rescoring(nn.Module):
    """forward(network_N, features_NF, offered) -> log p' of the targets (N,), in nats.

    `network_N` is their log p.
    """

    def __init__(self, num_features: int, num_each: int, hidden: int, layers: int = 1) -> None:
        super().__init__()
        self.place = nn.Linear(num_features, hidden)
        self.each = nn.Linear(num_each, hidden, bias=False)
        self.further = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers - 1)])
        self.outer = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, network_N: Tensor, features_NF: Tensor, offered: Offered) -> Tensor:
        pieces = []
        for at in range(0, max(len(network_N), 1), PLACES_AT_ONCE):
            piece = slice(at, at + PLACES_AT_ONCE)
            pieces.append(network_N[piece] + self.gains(features_NF[piece], offered[piece]))
        return torch.cat(pieces)

    def gains(self, features_NF: Tensor, offered: Offered) -> Tensor:
        """log p' - log p of the targets, (N,)."""
        # A share of other tokens below some 1e-7 is lost in rounding, as it is in any sum of all tokens.
        raised_NC = self.raised(features_NF, offered.features_NCX)
        rest_N = (1 - offered.log_NC.exp().sum(1)).clamp(min=0)
        total_N = torch.cat((rest_N.log()[:, None], offered.log_NC + raised_NC), 1).logsumexp(1)
        target_N1 = offered.target_N[:, None]
        own_N1 = raised_NC.gather(1, target_N1.clamp(min=0)).where(target_N1 >= 0, 0.0)
        return own_N1[:, 0] - total_N

    def raised(self, features_NF: Tensor, features_NCX: Tensor) -> Tensor:
        """a of each candidate, (N, C)."""
        hidden_NCH = F.gelu(self.place(features_NF)[:, None] + self.each(features_NCX.float()))
        for layer in self.further:
            hidden_NCH = F.gelu(layer(hidden_NCH))
        a_NC: Tensor = self.outer(hidden_NCH)[..., 0]
        return a_NC
