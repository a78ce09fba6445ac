"""Growing depth: a run trains few of its layers at first and switches the others on later.

    active layer:  x <- x + s mixer(norm(x)),  x <- x + feedforward(norm(x));    idle layer:  x <- x

After Net2Net (Chen et al. 2016, arXiv 1511.05641), where a network grows without changing its function, and
"Efficient training of BERT by progressively stacking" (Gong et al. 2019), where it grows by layers. Here
nothing is copied: a layer whose output projections start at zero (`zero_init`) adds nothing when it is
switched on, so the loss goes on where it was; others disturb it. All layers have their weights, their place
in the wiring and their optimizer state from the start, and checkpoints are those of the whole model.

The plan says how many layers are active (`Plan.layers`). Idle ones get no gradient, and do not decay.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sabrage.context import Context


def active_layers(num_layers: int, active: int) -> list[int]:
    """Which layers work when `active` (at least 1) of them do, in order: a spread choice, both ends included.

    Layers leave one at a time, each time the one whose neighbours are nearest to each other, the earliest of
    several. So fewer layers are always some of the more: of 12, 6 are 0 2 4 6 8 11, and 4 are 0 4 8 11.
    """
    layers = list(range(num_layers))
    while len(layers) > max(active, 2):
        widths = [after - before for before, after in zip(layers, layers[2:], strict=False)]
        del layers[1 + widths.index(min(widths))]
    return layers[:active]


class IdleBlock:
    """A block that adds nothing: what a wiring computes for it, a compiler can leave out."""

    def mixer(self, x_BTD: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(x_BTD)

    def feedforward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(x_BTD)


def with_idle(blocks: nn.ModuleList, context: Context) -> Iterable[Any]:
    """The blocks with idle ones in the places of those that `context.layers` leaves out.

    A wiring finds each layer at its own index, so scales, skips and tables of a layer stay its own.
    """
    if context.layers is None:
        return blocks
    assert context.cache is None, "a cache holds entries of every layer"
    active = active_layers(len(blocks), context.layers)
    return [block if layer in active else IdleBlock() for layer, block in enumerate(blocks)]
