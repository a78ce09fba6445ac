"""Tables of what is known of N places: they are cut and joined place by place, whatever their columns are."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Each field is a tensor whose first axis is the places, a table of its own, or None."""

    def __getitem__(self, chosen: Tensor | slice) -> Self:
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(value if value is None else value[chosen] for value in values))

    @classmethod
    def joined(cls, pieces: Sequence[Self]) -> Self:
        """One after another."""
        return cls(*(together([getattr(piece, field.name) for piece in pieces]) for field in fields(cls)))


def together(values: Sequence[Any]) -> Any:
    """One column of several tables; it is of one kind in all of them."""
    first = values[0]
    if first is None:
        assert all(value is None for value in values)
        return None
    return torch.cat(list(values)) if isinstance(first, Tensor) else type(first).joined(values)
