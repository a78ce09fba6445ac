"""The gate that mixes the network and the experts, and how it is fitted.

    p(token) = g_0 p_network(token) + sum_e g_e p_e(token),    g = softmax(U gelu(W features + b) + c)

over the network and those experts that know their context. Interpolation of models with weights by
context is Jelinek and Mercer's (1980); a network's share of it by its own uncertainty is that of pointer and
cache models (Grave et al. 2017, arXiv 1612.04426). All parts are distributions over the vocabulary and the
weights know nothing of the token, so the mixture is one as well. Where the evidence has candidates, the
network takes part as `rescoring` leaves it, and both are fitted as one.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.blend.evidence import Evidence
from sabrage.blend.replay import Replay
from sabrage.blend.rescoring import Rescoring

# The network's share before anything is fitted: e^3 parts to one of each expert.
HEAD_START = 3.0


class Gate(nn.Module):
    """forward(evidence) -> log-probabilities (N,), in nats.

    `rescoring` is (features, hidden units, layers of them) of what looks at candidates, None without them.
    """

    def __init__(
        self,
        num_features: int,
        num_experts: int,
        hidden: int,
        rescoring: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(num_features, hidden)
        self.outer = nn.Linear(hidden, 1 + num_experts)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        with torch.no_grad():
            self.outer.bias[0] = HEAD_START
        self.rescoring = Rescoring(num_features, *rescoring) if rescoring else None

    @classmethod
    def of(cls, evidence: Evidence, *, hidden: int, rescoring_hidden: int, rescoring_layers: int = 1) -> Self:
        """A gate before it is fitted, of the shape that the evidence asks for."""
        rescoring = None
        if evidence.candidates is not None:
            rescoring = evidence.candidates.features_NCX.shape[2], rescoring_hidden, rescoring_layers
        return cls(evidence.features_NF.shape[1], evidence.log_NE.shape[1], hidden, rescoring)

    def shares(self, evidence: Evidence) -> Tensor:
        """Logarithms of what the network and each expert are given, (N, 1 + E)."""
        raw = self.outer(F.gelu(self.inner(evidence.features_NF)))
        return raw.masked_fill(F.pad(~evidence.known_NE, (1, 0)), -torch.inf).log_softmax(1)

    def forward(self, evidence: Evidence) -> Tensor:
        network_N = evidence.network_N
        assert (self.rescoring is None) == (evidence.candidates is None)
        if self.rescoring is not None and evidence.candidates is not None:
            network_N = self.rescoring(network_N, evidence.features_NF, evidence.candidates)
        each = torch.cat((network_N[:, None], evidence.log_NE), 1)
        return torch.logsumexp(self.shares(evidence) + each, 1)


def fit(
    evidence: Evidence,
    *,
    hidden: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    rescoring_hidden: int = 0,
    rescoring_layers: int = 1,
) -> Gate:
    """A gate for which the evidence's tokens are likely: AdamW on random batches, its rate falling to 0."""
    device = evidence.network_N.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        gate = Gate.of(
            evidence, hidden=hidden, rescoring_hidden=rescoring_hidden, rescoring_layers=rescoring_layers
        ).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    chosen = torch.empty(batch, dtype=torch.int64, device=device)
    recorded = device.type == "cuda"
    # A graph reads the rate where it was, so that there it is a tensor that stays.
    rate = torch.tensor(lr, device=device)
    optimizer = torch.optim.AdamW(
        gate.parameters(),
        lr=rate if recorded else lr,
        weight_decay=0.01,
        fused=recorded,
        capturable=recorded,
    )

    def update() -> None:
        loss = -gate(evidence[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    again = Replay(update, device, clear=optimizer.zero_grad)
    for step in range(steps):
        torch.randint(len(evidence), (batch,), device=device, generator=generator, out=chosen)
        now = lr * min(1.0, 1.5 * (1 - step / steps))
        if recorded:
            rate.fill_(now)
        else:
            optimizer.param_groups[0]["lr"] = now
        again()
    again.end()
    return gate.requires_grad_(False)
