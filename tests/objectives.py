"""Every objective with several targets on the tiny recipe, and a tokenizer in which tokens have prefixes."""

from dataclasses import dataclass, replace

from sabrage.attention.multi_head import MultiHead
from sabrage.feedforward.mlp import Mlp
from sabrage.objective.heads import HeadsAhead
from sabrage.objective.prefix import PrefixTarget
from sabrage.objective.sequential import SequentialAhead
from sabrage.objective.shared import SharedAhead
from sabrage.plan import Constant

OBJECTIVES = {
    "shared": SharedAhead(tokens=3),
    "heads": HeadsAhead(tokens=3, feedforward=Mlp()),
    "heads-mixed": HeadsAhead(tokens=2, feedforward=Mlp(), mixer=MultiHead(heads=2)),
    "sequential": SequentialAhead(depth=2, mixer=MultiHead(heads=2), feedforward=Mlp()),
    "prefix": PrefixTarget(),
}


@dataclass(frozen=True)
class Pieces:
    """Token v stands for 1 + v // 26 times the same letter, so that all but the first 26 have a prefix."""

    vocab_size: int = 257
    end_of_text: int = 256

    def decode_bytes(self, tokens):
        return b"".join(bytes([97 + token % 26]) * (1 + token // 26) for token in tokens)


def weighted(recipe, objective, *weights):
    """The recipe with an objective and constant loss weights, 1 and falling by halves if none are given."""
    weights = weights or [2.0**-index for index in range(objective.num_weights())]
    plan = replace(recipe.plan, loss_weights=tuple(Constant(value=value) for value in weights))
    return replace(recipe, objective=objective, plan=plan)
