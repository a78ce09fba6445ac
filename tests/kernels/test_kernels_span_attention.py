"""Attention over spans: who sees whom, and what the kernel is used for."""

import pytest
import torch

from sabrage.attention.backends import attend
from sabrage.attention.masks import visible
from sabrage.context import Context
from sabrage.kernels import span_attention as room
from sabrage.kernels.language import KernelError
from sabrage.kernels.span_attention import SPAN, span_attention, span_attention_reference, spans

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)


def documents(length: int, *, rows: int = 3, mean: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(rows, length, generator=generator) < 1 / mean).cumsum(1)


def heads(length: int, *, rows: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, length, 2, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("length", [1, 64, 65, 217])
@pytest.mark.parametrize("mean", [2, 30, None])
def test_spans_say_what_the_mask_says(length: int, window: int | None, mean: int | None) -> None:
    documents_BT = None if mean is None else documents(length, mean=mean)
    seen_BTS = visible(Context(documents_BT=documents_BT), length, torch.device("cpu"), window=window)[:, 0]
    seen_BTS = seen_BTS.expand(3, -1, -1)
    starts_BT, ends_BN = spans(torch.zeros(3, length), documents_BT, window)
    index_T = torch.arange(length)
    told_BTS = (index_T <= index_T[:, None]) & (index_T >= starts_BT[..., None])
    assert torch.equal(told_BTS, seen_BTS)
    # The last query that sees any key of a tile.
    for tile in range(ends_BN.shape[1]):
        asked_BT = seen_BTS[..., tile * SPAN : (tile + 1) * SPAN].any(-1)
        last_B = (asked_BT * (index_T + 1)).amax(1)
        assert torch.equal(ends_BN[:, tile].long(), last_B)


def test_starts_never_move_back() -> None:
    starts_BT, _ = spans(torch.zeros(3, 217), documents(217), 40)
    assert (starts_BT.diff(dim=1) >= 0).all()


@interpreted
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("mean", [None, 30])
def test_the_backend_is_attention_under_its_mask(window: int | None, mean: int | None) -> None:
    documents_BT = None if mean is None else documents(150, mean=mean)
    found = []
    for backend in ("plain", "triton"):
        leaves = [x.clone().requires_grad_() for x in heads(150)]
        context = Context(documents_BT=documents_BT)
        out = attend(*leaves, context, backend=backend, window=window)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@interpreted
def test_fewer_key_heads_and_narrower_values_are_attention_too() -> None:
    q, k, v = heads(70)
    narrow = (q, k[:, :, :1], v[:, :, :1, :10])
    found = [attend(*narrow, Context(), backend=name, window=20) for name in ("plain", "triton")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@interpreted
def test_what_nobody_may_see_changes_nothing() -> None:
    """Bit for bit, whatever other documents hold."""
    documents_BT = torch.arange(192).expand(1, -1) // 96
    q, k, v = heads(192, rows=1)
    starts = spans(q[:, :, 0, 0], documents_BT, 50)
    out = span_attention(q, k, v, *starts)
    k[:, :96], v[:, :96] = 1e4, -1e4
    assert torch.equal(span_attention(q, k, v, *starts)[:, 96:], out[:, 96:])


@interpreted
def test_the_registration_of_the_operations_is_sound() -> None:
    q, k, v = (x.requires_grad_() for x in heads(70))
    documents_BT = documents(70)
    torch.library.opcheck(spans, (torch.zeros(3, 70), documents_BT, 20))
    torch.library.opcheck(room._forward, (q, k, v, *spans(torch.zeros(3, 70), documents_BT, 20), 0.25))


def test_other_shapes_are_refused() -> None:
    q, k, v = heads(70)
    made = spans(torch.zeros(3, 70), None, None)
    with pytest.raises(KernelError, match="one shape"):
        span_attention(q, k[:, :, :1], v, *made)
    with pytest.raises(KernelError, match="heads of 128 at most"):
        span_attention(*(torch.zeros(3, 70, 2, 130) for _ in range(3)), *made)
    with pytest.raises(KernelError, match=r"make both with spans\(\)"):
        span_attention(q, k, v, made[0][:, :69], made[1])


def test_the_reference_takes_a_scale() -> None:
    q, k, v = heads(20)
    starts_BT, _ = spans(torch.zeros(3, 20), None, None)
    found = span_attention_reference(2 * q, k, v, starts_BT, scale=0.125)
    torch.testing.assert_close(found, span_attention_reference(q, k, v, starts_BT, scale=0.25))
