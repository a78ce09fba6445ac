"""The dense cache: every declared stream of every layer, for sequences of one common length.

Bytes per token = sum over layers of the widths that the parts' `streams` declare, times the element size.
"""

import torch
from torch import Tensor

from sabrage.context import Pages
from sabrage.model.lm import ModelSpec


def streams_of(spec: ModelSpec, layer: int) -> dict[str, int]:
    """Widths of what one layer caches per token, by stream name."""
    parts = [spec.mixer(layer).streams(spec.dim), spec.feedforward(layer).streams(spec.dim)]
    if layer == 0:
        parts.append(spec.embedding.streams(spec.dim))
        parts += [spec.last.streams(spec.dim)] if spec.last else []
    pairs = [pair for streams in parts for pair in streams.items()]
    assert len(dict(pairs)) == len(pairs), f"layer {layer}: two of its parts share a stream's name"
    return dict(pairs)


def upload(host: Tensor, device: Tensor) -> None:
    """Copies without waiting; the host's tensor may be changed at once."""
    # Pinned memory of its own each time, which torch takes back when the copy is done.
    device.copy_(host.pin_memory() if device.is_cuda else host, non_blocking=True)


class DenseCache:
    """Holds up to `capacity` positions of `batch` sequences; entries beyond `length` are undefined."""

    paged = False

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity, self.length = capacity, 0
        self.layers: list[dict[str, Tensor]] = [
            {
                name: torch.empty(batch, capacity, width, device=device, dtype=dtype)
                for name, width in streams_of(spec, layer).items()
            }
            for layer in range(spec.layers)
        ]

    def extend(self, layer: int, **streams_BTX: Tensor) -> dict[str, Tensor]:
        """Appends each stream's new entries at the current length; returns all entries, (B, length + T, X).

        Raises ValueError when the capacity is used up.
        """
        stored = self.layers[layer]
        assert streams_BTX.keys() <= stored.keys(), (
            f"layer {layer} caches {sorted(streams_BTX)}, its parts declare {sorted(stored)}"
        )
        new = next(iter(streams_BTX.values())).shape[1]
        end = self.length + new
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens and {end} were needed; ask for fewer tokens or a "
                "larger capacity"
            )
        for name, value_BTX in streams_BTX.items():
            stored[name][:, self.length : end] = value_BTX
        return {name: stored[name][:, :end] for name in streams_BTX}

    def append(self, layer: int, **streams_BTX: Tensor) -> dict[str, Pages]:
        """Not for this cache: it has no pages."""
        raise NotImplementedError("a dense cache has no pages; use extend")

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens that every layer has appended."""
        self.length += num_tokens

    def rewind(self, length: int) -> None:
        """Forgets the entries at and beyond `length`, at most the present one."""
        assert 0 <= length <= self.length, f"a cache of {self.length} tokens cannot go back to {length}"
        self.length = length

    def bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for stored in self.layers for t in stored.values())
