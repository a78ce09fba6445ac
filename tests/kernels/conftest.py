"""Fixtures of the kernel tests: where kernels run, and memory that is NaN before it is written."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory from torch.empty and torch.empty_like holds NaN, so that what is not written shows."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def filled(*arguments, _plain=plain, **options):
            made = _plain(*arguments, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, filled)
