"""The extras' glue, with stand-ins that have the packages' signatures and the reference's numbers."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sabrage.attention import packages
from sabrage.attention.backends import attend
from sabrage.context import Context


def whole(q, k, v, scale, window):
    """The reference; the packages' own scale is checked by giving it as one."""
    return attend(q * (scale * q.shape[-1] ** 0.5), k, v, Context(), backend="plain", window=window)


class FlashAttention3:
    """What the hub's package offers."""

    @staticmethod
    def get_kernel(repository, *, version):
        return SimpleNamespace(flash_attn_func=FlashAttention3.flash_attn_func)

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        assert causal
        assert window_size[1] == 0
        return whole(q, k, v, softmax_scale, None if window_size[0] < 0 else window_size[0] + 1)


class FlashAttention4:
    """What `flash_attn.cute.interface` offers: kernels without gradients."""

    @staticmethod
    def _window(causal, sides):
        assert causal == (not sides)
        return sides["window_size_left"] + 1 if sides else None

    @staticmethod
    def _flash_attn_fwd(q, k, v, *, softmax_scale, causal, return_lse, **sides):
        out = whole(q, k, v, softmax_scale, FlashAttention4._window(causal, sides))
        return out.contiguous(), q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), None, None

    @staticmethod
    def _flash_attn_bwd(q, k, v, out, dout, lse, *, softmax_scale, causal, **sides):
        assert dout.is_contiguous()
        window = FlashAttention4._window(causal, sides) or len(q[0])
        # By hand: inside an operation nothing is recorded.
        groups = q.shape[2] // k.shape[2]
        wide_k, wide_v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        distance = torch.arange(len(q[0]))[:, None] - torch.arange(len(q[0]))
        scores = torch.einsum("bthk,bshk->bhts", q, wide_k) * softmax_scale
        weights = scores.masked_fill((distance < 0) | (distance >= window), float("-inf")).softmax(-1)
        slope = torch.einsum("bthk,bshk->bhts", dout, wide_v)
        slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * softmax_scale
        dq = torch.einsum("bhts,bshk->bthk", slope, wide_k)
        dk = torch.einsum("bhts,bthk->bshk", slope, q)
        dv = torch.einsum("bhts,bthk->bshk", weights, dout)
        return dq, *(x.unflatten(2, (-1, groups)).sum(3) for x in (dk, dv))


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", FlashAttention3)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, FlashAttention4)
    monkeypatch.setitem(packages.FUNCTIONS, "fa3", FlashAttention3.flash_attn_func)


def draw(value_width):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 40, 4, 16), (2, 40, 2, 16), (2, 40, 2, value_width)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("value_width", [16, 8])
@pytest.mark.parametrize("name", packages.MODULES)
def test_a_package_is_one_node_with_the_gradients_of_its_own_kernel(name, value_width, window, compiled):
    qkv = draw(value_width)

    def function(q, k, v):
        return packages.run(name, q, k, v, window=window)

    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    out = function(*qkv)
    expected = attend(*qkv, Context(), backend="plain", window=window)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad((each * pull).sum(), qkv) for each in (out, expected))
    for got, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5)


def test_the_hubs_function_is_loaded_once(monkeypatch):
    monkeypatch.delitem(packages.FUNCTIONS, "fa3")
    assert packages.fa3() is FlashAttention3.flash_attn_func
    monkeypatch.delitem(sys.modules, "kernels")
    assert packages.fa3() is FlashAttention3.flash_attn_func


def test_a_package_that_is_there_is_run_before_it_is_believed(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail(name):
        raise RuntimeError("no kernel image")

    for trial, said in ((fail, "fails on this device: RuntimeError: no kernel image"),
                        (lambda name: 0.4, "is wrong on this device by 0.4"),
                        (lambda name: float("nan"), "is wrong on this device by nan"),
                        (lambda name: 0.01, None)):  # fmt: skip
        monkeypatch.setattr(packages, "trial", trial)
        packages.missing.cache_clear()
        assert packages.missing("fa3") == said
    packages.missing.cache_clear()
