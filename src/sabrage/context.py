"""What travels with the activations: positions, documents, the cache and terms of the loss.

Shape letters: B batch, T time, S entries or page size, P pages, N pages of a sequence, X any width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """One stream of one layer in a paged cache, to be read where it lies.

    Entry s of sequence b is `pages_PSX[table_BN[b, s // S], s % S]`. `lengths_B` counts each sequence's
    entries, those just appended included; what lies beyond them is undefined. Table and lengths are int32.
    """

    pages_PSX: Tensor
    table_BN: Tensor
    lengths_B: Tensor


class Cache(Protocol):
    """What a decoding part sees of a cache; the cache knows streams (name -> width), not attention.

    `paged` says whether `append` can be used; `extend` always can. A part appends all its own streams in
    one call a pass, by one of the two.
    """

    paged: bool

    def extend(self, layer: int, **streams_BTX: Tensor) -> dict[str, Tensor]:
        """Appends T new entries of each declared stream and returns all entries of each, (B, S, X).

        S covers the longest sequence. Entry s of sequence b is position s; entries at or beyond the
        sequence's length are undefined and must be masked with `Context.positions_BT`.
        """
        ...

    def append(self, layer: int, **streams_BTX: Tensor) -> dict[str, Pages]:
        """Appends T new entries of each declared stream and copies nothing else."""
        ...


@dataclass
class Context:
    """What a part may know beside its input: absolute positions (None: 0 to T-1), documents, the cache.

    `tokens_BT` is what the model was given, `pairs_BT` a hash (int64) of each token and the one before where
    the embedding makes one and `pair_BTD` its vector of that pair, `values_BTD` what the mixer that is called
    adds to its values, `head_VD` the head's table for the mixer that the model has last.
    `window` and `layers` are the plan's, as in `Knobs`; with a cache all layers are active. In training a
    part may add terms to the loss with `add_loss`, and numbers to the log with `note`.
    """

    positions_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    cache: Cache | None = None
    window: int | None = None
    layers: int | None = None
    tokens_BT: Tensor | None = None
    pairs_BT: Tensor | None = None
    pair_BTD: Tensor | None = None
    values_BTD: Tensor | None = None
    head_VD: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    readings: dict[str, list[Tensor]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once a forward pass; it must depend on this context and the key alone."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def add_loss(self, name: str, term: Tensor) -> None:
        """Adds a 0-D term, weighted by the part that brings it; terms of one name are summed over layers."""
        self.losses[name] = self.losses[name] + term if name in self.losses else term

    def note(self, name: str, value: Tensor) -> None:
        """Shows a 0-D number in the log; those of one name are averaged over layers."""
        self.readings.setdefault(name, []).append(value.detach())
