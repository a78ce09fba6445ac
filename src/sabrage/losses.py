"""What training minimises, as an interface: `Objective`, and the `Loss` that its module gives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from sabrage.config import Part
from sabrage.parts import FeedForward, Mixer, Tokenizer


@dataclass
class Loss:
    """`total` is what is minimised; `parts` are named 0-D tensors for the log, in nats."""

    total: Tensor
    parts: dict[str, Tensor]

    def plus(self, terms: dict[str, Tensor]) -> "Loss":
        """With named terms added to both."""
        return Loss(sum(terms.values(), self.total), self.parts | terms)


@dataclass(frozen=True, kw_only=True)
class Objective(Part, ABC):
    """What is minimised. The module's `forward(h_BTD, batch, model, loss_weights_W) -> Loss`.

    It owns any extra heads. `model` gives `embedding` and `head`. Validation never uses an objective: it
    is always plain next-token cross-entropy.
    """

    @abstractmethod
    def build(self, *, dim: int, vocab_size: int) -> nn.Module: ...

    def num_weights(self) -> int:
        """How many loss weights the plan has to give."""
        return 0

    def extra_heads(self) -> int:
        """Passes of the head beside the model's own, each with a block before it."""
        return 0

    def flops(self, dim: int, sequence_length: int, head: int) -> int:
        """Matrix-product FLOPs of one token's forward pass beside the model's; `head`: a pass of the head."""
        return 0

    def read(self, module: nn.Module, tokenizer: Tokenizer | None) -> None:
        """Gives the module what it has to know of the vocabulary, before training. Raises DataError."""
        return

    def draft_blocks(self) -> tuple[tuple[Mixer, FeedForward], ...]:
        """The blocks that draft tokens in decoding, one a token; none where the module has no `draft`.

        `draft(index, h_BTD, tokens_BT, model, context) -> h_BTD`, ready for the head: block `index` reads
        what the one before it (the first: the model) made of positions i, and tokens i + 1 + index.
        """
        return ()
