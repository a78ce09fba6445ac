"""Attention backends: all compute what `plain` computes, and none runs where it cannot."""

from typing import get_args

import pytest
import torch

from sabrage.attention.backends import Backend, attend, choose_backend, visible
from sabrage.attention.multi_head import MultiHead
from sabrage.context import Context
from sabrage.generate.cache import DenseCache
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts


def draw(*, batch=2, queries=17, keys=None, heads=3, width=16, dtype=torch.float32, device="cpu", seed=0):
    """q_BTHK, k_BSHK, v_BSHK and the gradient of the output, normal."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths = (queries, keys or queries, keys or queries, queries)
    shapes = [(batch, length, heads, width) for length in lengths]
    return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]


def run(function, q, k, v, pull):
    """The output and the gradients of q, k and v."""
    learning = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*learning)
    return [out.detach(), *torch.autograd.grad(out, learning, pull.to(out.dtype))]


def contexts():
    documents_BT = torch.tensor([[0] * 5 + [1] * 12, [3] * 16 + [4]])
    return {
        "causal": (17, None, Context()),
        "documents": (17, None, Context(documents_BT=documents_BT)),
        "decoding": (3, 17, Context(positions_BT=torch.tensor([[14, 15, 16], [9, 10, 11]]), cache=CACHE)),
        "one token": (1, 17, Context(positions_BT=torch.tensor([[16], [3]]), cache=CACHE)),
        "prefill": (17, None, Context(positions_BT=torch.arange(17).expand(2, -1), cache=CACHE)),
    }


CACHE = DenseCache(find("demo").model, batch=1, capacity=1)


@pytest.mark.parametrize("name", contexts())
def test_sdpa_equals_plain_in_output_and_gradients(name):
    queries, keys, context = contexts()[name]
    inputs = draw(queries=queries, keys=keys)
    plain, sdpa = (
        run(lambda q, k, v, b=backend: attend(q, k, v, context, backend=b), *inputs)
        for backend in ("plain", "sdpa")
    )
    for expected, got in zip(plain, sdpa, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 217])
def test_plain_is_softmax_of_scaled_products_over_the_past(length):
    q, k, v, _ = draw(batch=1, queries=length, heads=1, width=4)
    out = attend(q, k, v, Context(), backend="plain")
    for t in {0, length // 2, length - 1}:
        scores = torch.stack([(q[0, t, 0] * k[0, s, 0]).sum() / 2 for s in range(t + 1)])
        expected = (scores.exp() / scores.exp().sum()) @ v[0, : t + 1, 0]
        torch.testing.assert_close(out[0, t, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", get_args(Backend))
def test_every_backend_takes_documents_and_decoding_on_any_device(backend):
    for queries, keys, context in contexts().values():
        if context.cache is None and context.documents_BT is None:
            continue
        q, k, v, _ = draw(queries=queries, keys=keys)
        expected = attend(q, k, v, context, backend="plain")
        torch.testing.assert_close(attend(q, k, v, context, backend=backend), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_positions_without_a_cache_do_not_open_the_mask(backend):
    q, k, v, _ = draw()
    expected = attend(q, k, v, Context(), backend=backend)
    for positions_BT in (torch.arange(5, 22).expand(2, -1), torch.zeros(2, 17, dtype=torch.long)):
        got = attend(q, k, v, Context(positions_BT=positions_BT), backend=backend)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_the_mask_shows_the_past_of_the_same_document():
    mask = visible(Context(documents_BT=torch.tensor([[0, 0, 1]])), 3, torch.device("cpu"))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]
    decoding = Context(positions_BT=torch.tensor([[1], [2]]), cache=CACHE)
    assert visible(decoding, 4, torch.device("cpu"))[:, 0, 0].tolist() == [
        [True, True, False, False],
        [True, True, True, False],
    ]


def test_a_cache_with_documents_or_without_positions_is_not_guessed_at():
    q, k, v, _ = draw(queries=1, keys=5)
    with pytest.raises(AssertionError, match="positions"):
        attend(q, k, v, Context(cache=CACHE), backend="sdpa")
    documents = Context(
        positions_BT=torch.tensor([[4], [4]]), documents_BT=torch.zeros(2, 1, dtype=torch.long), cache=CACHE
    )
    with pytest.raises(AssertionError, match="documents"):
        attend(q, k, v, documents, backend="sdpa")


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_backend_never_gives_way_silently(backend, dtype):
    q, k, v, _ = draw(dtype=dtype)
    with pytest.raises(ValueError, match=f"attention backend '{backend}' takes bf16 or fp16 on CUDA"):
        attend(q, k, v, Context(), backend=backend)


def facts(capability, products="bf16", kind="cuda"):
    return DeviceFacts(kind=kind, name="card", memory=1, capability=capability, products=products)


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        (facts(None, kind="cpu"), "sdpa"),
        (facts(None, kind="mps"), "sdpa"),
        (facts((7, 5), "fp16"), "sdpa"),
        (facts((8, 0)), "flash"),
        (facts((8, 6), "fp16"), "flash"),
        (facts((8, 9), "fp8"), "flash"),
        (facts((9, 0)), "cudnn"),
        (facts((9, 0), "tf32"), "sdpa"),
        (facts((9, 0), "fp32"), "sdpa"),
        (facts((9, 0), None), "sdpa"),
        (facts((12, 0)), "flash"),
    ],
)
def test_auto_means_the_fastest_that_runs(device, chosen):
    assert choose_backend("auto", device) == chosen
    part = MultiHead(heads=2)
    assert part.resolve(device).backend == chosen
    assert part.resolve(device).refusal(device) is None


@pytest.mark.parametrize("backend", ["plain", "sdpa", "flash", "cudnn"])
def test_a_named_backend_stays_what_it_is(backend):
    assert choose_backend(backend, facts((9, 0))) == backend
    assert choose_backend(backend, facts(None, kind="cpu")) == backend


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fused attention needs a CUDA device")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [63, 217, 1024])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_fused_attention_errs_at_most_twice_as_much_as_torch_in_the_same_precision(backend, length, width):
    if backend == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's attention is chosen on Hopper only")
    inputs = draw(queries=length, heads=4, width=width, dtype=torch.bfloat16, device="cuda")
    context = Context()
    fused = run(lambda q, k, v: attend(q, k, v, context, backend=backend), *inputs)
    same = run(same_precision, *inputs)
    exact = run(lambda q, k, v: attend(q, k, v, context, backend="plain"), *(x.float() for x in inputs))
    for name, got, torchs, truth in zip(("out", "dq", "dk", "dv"), fused, same, exact, strict=True):
        error, allowed = ((x.float() - truth).abs().max().item() for x in (got, torchs))
        assert error <= 2 * allowed + 1e-5, f"{name}: error {error:.3g}, that of torch in bf16 {allowed:.3g}"


def same_precision(q_BTHK, k_BTHK, v_BTHK):
    """Causal attention with every product in the inputs' precision."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    later = torch.ones(q.shape[2], q.shape[2], device=q.device).triu(1).bool()
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(later, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)
