"""The situations that every attention backend is held to, and the inputs that tests draw for them."""

from dataclasses import dataclass, replace

import torch

from sabrage.attention.backends import KNOWS, attend, needs_of
from sabrage.attention.scores import Alibi, RelativeBias, ScorePart, SoftCap
from sabrage.context import Context
from sabrage.generate.cache import DenseCache
from sabrage.recipes import find

CACHE = DenseCache(find("demo").model, batch=1, capacity=1)


@dataclass(frozen=True)
class Case:
    """T queries of H heads and S keys of G, keys of width K and values of width X; documents by length."""

    name: str
    queries: int = 217
    keys: int | None = None
    heads: int = 4
    groups: int = 4
    width: int = 16
    value_width: int | None = None
    window: int | None = None
    documents: tuple[tuple[int, ...], ...] | None = None
    positions: tuple[int, ...] | None = None
    scores: tuple[ScorePart, ...] = ()
    batch: int = 2

    def context(self, device="cpu"):
        documents_BT = positions_BT = None
        if self.documents:
            rows = [[n for n, size in enumerate(sizes) for _ in range(size)] for sizes in self.documents]
            documents_BT = torch.tensor(rows, device=device)
        if self.positions:
            first_B1 = torch.tensor(self.positions, device=device)[:, None]
            positions_BT = first_B1 + torch.arange(self.queries, device=device)
        return Context(positions_BT, documents_BT, CACHE if self.positions else None)

    def inputs(self, dtype=torch.float32, device="cpu"):
        """q, k, v and the gradient of the output."""
        generator = torch.Generator(device).manual_seed(0)
        keys, width, wide = self.keys or self.queries, self.width, self.value_width or self.width
        shapes = [(self.queries, self.heads, width), (keys, self.groups, width)]
        shapes += [(keys, self.groups, wide), (self.queries, self.heads, wide)]
        return [
            torch.randn(self.batch, *shape, generator=generator, device=device).to(dtype) for shape in shapes
        ]

    def modules(self, device="cpu"):
        """The score modules, with learned numbers that are not zero."""
        torch.manual_seed(1)
        modules = [score.build(heads=self.heads).to(device) for score in self.scores]
        for module in modules:
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
        return modules

    def known_to(self, backend):
        """Whether the backend computes the case itself rather than give way."""
        needs = needs_of(
            window=self.window is not None, documents=bool(self.documents), scores=bool(self.scores)
        )
        return KNOWS[backend].issuperset(needs) and not self.positions

    def run(self, backend, *, dtype=torch.float32, rounded=None, device="cpu", attention=attend):
        """The output and the gradients of q, k, v and of what the scores learn, by name.

        Inputs are rounded to the precision `rounded` first.
        """
        *qkv, pull = (x.to(dtype) for x in self.inputs(rounded or dtype, device))
        learning, modules = [x.requires_grad_() for x in qkv], self.modules(device)
        learned = [parameter for module in modules for parameter in module.parameters()]
        out = attention(*learning, self.context(device), backend=backend, window=self.window, scores=modules)
        gradients = torch.autograd.grad(out, [*learning, *learned], pull)
        names = ["out", "dq", "dk", "dv", *(f"learned {index}" for index in range(len(learned)))]
        return dict(zip(names, [out.detach(), *gradients], strict=True))


DOCUMENTS = ((5, 130, 82), (216, 1))
CASES = [
    Case("causal"),
    Case("one token", queries=1),
    Case("whole blocks", queries=256),
    Case("grouped", groups=2),
    Case("one key head", groups=1),
    Case("narrow values", value_width=8),
    Case("wide values", value_width=32),
    Case("window", window=40),
    Case("window of one", window=1),
    Case("window of blocks", queries=300, window=128),
    Case("documents", documents=DOCUMENTS),
    Case("documents and window", documents=DOCUMENTS, window=40, groups=2),
    Case("decoding", queries=3, keys=217, positions=(214, 9)),
    Case("decoding in a window", queries=3, keys=217, positions=(214, 9), window=40, groups=2),
    Case("prefill", keys=217, positions=(0, 0)),
    Case("alibi", scores=(Alibi(),)),
    Case("alibi of six heads in a window", heads=6, groups=3, scores=(Alibi(),), window=40),
    Case("learned bias", scores=(RelativeBias(max_distance=64),), groups=2),
    Case("learned bias and documents", scores=(RelativeBias(),), documents=DOCUMENTS),
    Case("soft cap over alibi", scores=(Alibi(), SoftCap(cap=2.0))),
    Case("decoding with a bias", queries=3, keys=217, positions=(214, 9), scores=(RelativeBias(),)),
]


@torch.no_grad()
def two_layers_with_flex(part, x_BTD, *, prepare=lambda layer: None):
    """(output compiled with flex, output of `plain`, the graphs) of two layers of `part` on DOCUMENTS."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(backend):
        torch.manual_seed(0)
        layers = [
            replace(part, backend=backend).build(dim=x_BTD.shape[-1], layer=layer) for layer in range(2)
        ]
        for layer in layers:
            prepare(layer)

        def forward(x_BTD, documents_BT):
            context = Context(documents_BT=documents_BT)
            for layer in layers:
                x_BTD = x_BTD + layer(x_BTD, context)
            return x_BTD

        return forward

    documents_BT = Case("", documents=DOCUMENTS).context().documents_BT
    compiled = torch.compile(run("flex"), fullgraph=True, dynamic=False, backend=count)
    return compiled(x_BTD, documents_BT), run("plain")(x_BTD, documents_BT), graphs
