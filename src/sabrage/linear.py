"""A linear layer without a bias, y = product(x, W), whose matrix product a `Precision` may replace.

The replacement is for training alone: a scale taken from a whole tensor lets every token see a little of all
others, and evaluation must stay causal, so there the product is the plain one.
"""

import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.config import ConfigError

# product(x_XI, weight_OI) -> y_XO, I inputs and O outputs.
Product = Callable[[Tensor, Tensor], Tensor]

# A gate reads this many of a token's numbers, or as many as there are (modded-nanogpt).
GATE_WIDTH = 12


class Linear(nn.Linear):
    """forward(x_XI) -> y_XO; initialised as torch's own.

    `replaceable` is turned off by a module that reads the weight itself, in a kernel of its own.
    """

    replaceable = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.product: Product = F.linear

    def forward(self, x_XI: Tensor) -> Tensor:
        return self.multiply(x_XI, self.weight)

    def multiply(self, x_XI: Tensor, weight_OI: Tensor) -> Tensor:
        """The product of this layer with a weight that may have been padded."""
        return (self.product if self.training else F.linear)(x_XI, weight_OI)


def replace_products(
    model: nn.Module, patterns: Iterable[str], make: Callable[[str, Linear], Product]
) -> None:
    """Gives `make(name, layer)` to every Linear whose module name one of the patterns is found in.

    Raises ConfigError for a pattern that matches none that is replaceable.
    """
    modules = model.named_modules()
    layers = {name: each for name, each in modules if isinstance(each, Linear) and each.replaceable}
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in layers):
            kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers}))
            raise ConfigError(
                f"precision: product {pattern!r} matches no layer that can take another product; "
                f"the model has {kinds or 'none'}"
            )
    for name, layer in layers.items():
        if any(re.search(pattern, name) for pattern in patterns):
            layer.product = make(name, layer)


def check_patterns(field: str, patterns: Iterable[str]) -> list[str]:
    """Sentences about the patterns that are no regular expressions."""
    found = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            found.append(f"{field}: pattern {pattern!r} is not a regular expression: {error}")
    return found


def opened(x_BTD: Tensor, gate_X: Tensor) -> Tensor:
    """(B, T, 1): how far the first X numbers of x open a gate, from 0 to 2; 1 where it is zeros."""
    return 2 * torch.sigmoid((x_BTD[..., : len(gate_X)] * gate_X).sum(-1, keepdim=True))
