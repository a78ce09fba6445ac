"""The small interfaces between rooms: what a recipe is made of and what each piece must offer.

Parts (frozen values) build modules. Modules meet only through the types of this file, so a technique is one
file with one part in it. Shapes: B batch, T time, D model width, H heads, K head width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sabrage.config import Part
from sabrage.run.device import DeviceFacts
from sabrage.schedule import Schedule


@dataclass(frozen=True)
class Knobs:
    """The values of everything that varies in time, at one step of a run of `steps`.

    `lr` and `weight_decay` multiply each optimizer's peak values; `loss_weights` are the objective's.
    `window` is how many tokens a windowed layer sees, itself included, `layers` how many work; None: all.
    """

    step: int
    lr: float
    sequence_length: int
    tokens_per_step: int
    weight_decay: float = 1.0
    momentum: float | None = None
    loss_weights: tuple[float, ...] = ()
    window: int | None = None
    layers: int | None = None
    steps: int = 1


@dataclass
class Batch:
    """One micro-batch on the device: `targets_BT[b, t]` is the token after `tokens_BT[b, t]`, both int64.

    `documents_BT` numbers the document of each token; None: attention may run over their boundaries.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Mixer(Part, ABC):
    """Mixes along time. The module's `forward(x_BTD, context) -> y_BTD` is causal."""

    @abstractmethod
    def build(self, *, dim: int, layer: int) -> nn.Module:
        """The module of one layer; its index is only for the cache and for per-layer patterns."""

    def takes_values(self) -> bool:
        """Whether the module adds `Context.values_BTD` to its values."""
        return False

    @abstractmethod
    def streams(self, dim: int) -> dict[str, int]:
        """Numbers cached per token and layer, by stream name."""

    @abstractmethod
    def flops(self, dim: int, sequence_length: int) -> int:
        """Matrix-product FLOPs of one token's forward pass at this sequence length, causal."""


@dataclass(frozen=True, kw_only=True)
class FeedForward(Part, ABC):
    """Works on each token, seeing no later one. The module's `forward(x_BTD, context) -> y_BTD`."""

    @abstractmethod
    def build(self, *, dim: int, layer: int) -> nn.Module: ...

    def streams(self, dim: int) -> dict[str, int]:
        """Numbers cached per token and layer, by stream name; none where each token stands alone."""
        return {}

    @abstractmethod
    def flops(self, dim: int) -> int:
        """Matrix-product FLOPs of one token's forward pass."""

    def idle(self, dim: int) -> int:
        """Learned numbers that one token does not use; none where all see every token."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Wiring(Part, ABC):
    """Owns the layer loop, residuals and norms. The module's `forward(x_BTD, blocks, context) -> h_BTD`.

    A block has `mixer` and `feedforward`; what comes out is normalised, ready for the head.
    """

    def value_layers(self, num_layers: int) -> Collection[int]:
        """The layers for whose mixers it sets `Context.values_BTD`."""
        return ()

    def takes_pairs(self) -> bool:
        """Whether it reads `Context.pairs_BT` or `pair_BTD`."""
        return False

    @abstractmethod
    def build(self, *, dim: int, num_layers: int, vocab_size: int) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Embedding(Part, ABC):
    """Tokens to vectors: `forward(tokens_BT, context) -> x_BTD`; `weight` is the module's (V, D) table."""

    @abstractmethod
    def build(self, *, dim: int, vocab_size: int) -> nn.Module: ...

    def streams(self, dim: int) -> dict[str, int]:
        """Numbers cached per token, with those of layer 0, by stream name; none where tokens stand alone."""
        return {}

    def gives_pairs(self) -> bool:
        """Whether it sets `Context.pairs_BT` and `pair_BTD`."""
        return False


@dataclass(frozen=True, kw_only=True)
class Head(Part, ABC):
    """Vectors to predictions: `forward(h_BTD) -> logits_BTV`, `loss(h_BTD, targets_BT) -> mean nats`.

    Targets of -1 are left out of the mean. `losses(h_BTD, targets_BTW, weights_W) -> (weighted total, mean of
    each of W sets of targets)` makes the logits once; a set without a target counts 0. With `tied` the model
    shares the embedding's table with it; with `copied` its own table starts as a copy of that one. Training
    holds the logits of `logit_tokens` tokens at once, 0: of all.
    """

    logit_tokens = 0
    tied: bool = True
    copied: bool = False

    @abstractmethod
    def build(self, *, dim: int, vocab_size: int) -> nn.Module: ...

    @abstractmethod
    def flops(self, dim: int, vocab_size: int, *, training: bool = False) -> int:
        """Matrix-product FLOPs of one token's forward pass."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(Part, ABC):
    """An update rule; parts whose parameters may move at each n-th step only make `every` a field."""

    every = 1

    @abstractmethod
    def build(self, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimizer of these named parameters: its `state` holds tensors only, and as torch has it for
        loss scaling its `step` changes nothing where its `found_inf` (0-D) holds 1."""

    @abstractmethod
    def hyperparameters(self, knobs: Knobs) -> dict[str, float]:
        """The values that the optimizer's parameter groups take at this step, by their torch names."""

    def due(self, step: int) -> bool:
        """Whether the parameters move at this step; where not, gradients add up until the next that is."""
        return (step + 1) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class OptimizerGroup(Part):
    """Parameters whose names match `pattern` (a regular expression, searched) go to `optimizer`.

    Groups are tried in order and the first match wins. `lr` takes the place of the plan's schedule.
    """

    pattern: str
    optimizer: Optimizer
    lr: Schedule | None = None


class LossScaler(Protocol):
    """Keeps small gradients from vanishing in a narrow format: the loss is multiplied by `scale` (0-D)."""

    scale: Tensor

    def unscale(self, gradients: list[Tensor]) -> Tensor:
        """Divides gradients by the scale, adapts it, and returns 1 (0-D) where one is not finite, else 0."""

    def readings(self) -> dict[str, float]:
        """What the log shows of it, by name; waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Precision(Part, ABC):
    """Number formats of the run."""

    @abstractmethod
    def refusal(self, facts: DeviceFacts) -> str | None:
        """A sentence saying why this device cannot do it, or None when it can."""

    @abstractmethod
    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Sets number formats of weights and, every one, the backend's switches, before anything is compiled;
        what a format has to remember becomes buffers of `model` itself, not of modules in it."""

    def prepare_alone(self, model: nn.Module, device: torch.device) -> None:
        """`prepare` for a model without its learner, whose layers keep the names they train under."""
        self.prepare(nn.ModuleDict({"model": model}), device)

    @abstractmethod
    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""

    def scaler(self) -> LossScaler | None:
        """A fresh loss scaler, a module whose buffers are its state, or None where none is needed."""
        return None

    def masters(self) -> bool:
        """Whether optimizers move fp32 copies of narrower weights, which then follow, rounded."""
        return False

    @abstractmethod
    def peak(self) -> str:
        """The device's matrix rate that model FLOP utilisation is measured against: fp32, tf32, bf16, ..."""

    def wide(self) -> bool:
        """Whether activations are kept in 32 bits."""
        return self.peak() in ("fp32", "tf32")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...

    def decode_bytes(self, tokens: Iterable[int]) -> bytes: ...


Order = Literal["stream", "masked", "documents"]


class TokenStream(Protocol):
    """An endless, randomly addressable sequence of blocks of `block_tokens` inputs and their targets."""

    block_tokens: int
    blocks_per_epoch: int

    def rows(self, first_block: int, num_blocks: int, sequence_length: int) -> np.ndarray:
        """(rows, sequence_length + 1) uint16 tokens; a row's last token is the next row's first input."""


@dataclass(frozen=True)
class Corpus:
    """An opened data set, its checks passed: the training stream, the validation tokens and the tokenizer.

    Results are filed under `track` ("nocap", "stand-in", "embedded", "own"), and the manifest records the
    `fingerprint` (files, sizes, hashes). `validation` is a 1-D array of uint16 tokens, `end_of_text` stands
    before each document, or is None.
    """

    track: str
    train: TokenStream
    validation: np.ndarray
    vocab_size: int
    tokenizer: Tokenizer | None
    fingerprint: dict[str, Any]
    end_of_text: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataSource(Part, ABC):
    """Where the tokens come from, in blocks of `block_tokens`, of which a step takes whole ones.

    `order` "masked" keeps the documents of a row apart, "documents" also packs rows of whole documents.
    """

    block_tokens: int
    order: Order = "stream"

    @property
    def separates(self) -> bool:
        """Whether rows hold documents that do not see each other."""
        return self.order != "stream"

    @abstractmethod
    def open(self, folder: Path | None = None) -> Corpus:
        """Checks every file and opens the data set. Raises DataError naming the file and the remedy."""


class DataError(ValueError):
    """Data that cannot be used: names the file, what is wrong with it and the remedy."""
