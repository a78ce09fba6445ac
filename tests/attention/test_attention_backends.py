"""Attention backends: all compute what `plain` computes, and none runs where it cannot."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from attention_cases import CACHE, CASES, Case

from sabrage.attention import packages
from sabrage.attention.backends import KNOWS, Backend, attend, choose_backend, refusal
from sabrage.attention.masks import visible
from sabrage.attention.multi_head import MultiHead
from sabrage.attention.scores import Alibi
from sabrage.context import Context
from sabrage.run.device import DeviceFacts

FUSED = [name for name in KNOWS if name not in ("plain", "sdpa")]
NAMED = {case.name: case for case in CASES}


def facts(capability, products="bf16", kind="cuda", **more):
    return DeviceFacts(kind=kind, name="card", memory=1, capability=capability, products=products, **more)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sdpa_equals_plain_in_output_and_gradients(case):
    expected, got = case.run("plain"), case.run("sdpa")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", ["decoding", "decoding in a window", "prefill", "decoding with a bias"])
def test_every_fused_backend_decodes_on_any_device(backend, name):
    expected, got = NAMED[name].run("plain"), NAMED[name].run(backend)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["flash", "cudnn", "fa3", "fa4"])
def test_a_backend_that_knows_no_documents_gives_way_to_the_mask_in_full(backend):
    expected, got = NAMED["documents"].run("plain"), NAMED["documents"].run(backend)
    torch.testing.assert_close(got["out"], expected["out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 217])
def test_plain_is_softmax_of_scaled_products_over_the_past(length):
    q, k, v, _ = Case("", queries=length, heads=1, groups=1, width=4, batch=1).inputs()
    out = attend(q, k, v, Context(), backend="plain")
    for t in {0, length // 2, length - 1}:
        scores = torch.stack([(q[0, t, 0] * k[0, s, 0]).sum() / 2 for s in range(t + 1)])
        expected = (scores.exp() / scores.exp().sum()) @ v[0, : t + 1, 0]
        torch.testing.assert_close(out[0, t, 0], expected, atol=1e-5, rtol=1e-5)


def test_plain_stays_in_fp32_under_autocast():
    q, k, v, _ = Case("", groups=2).inputs()
    expected = attend(q, k, v, Context(), backend="plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, Context(), backend="plain"), expected)


def test_a_query_head_reads_the_key_head_of_its_group():
    q, k, v, _ = Case("", heads=6, groups=3).inputs()
    grouped = attend(q, k, v, Context(), backend="plain")
    for head in range(6):
        one = slice(head // 2, head // 2 + 1)
        alone = attend(q[:, :, head : head + 1], k[:, :, one], v[:, :, one], Context(), backend="plain")
        torch.testing.assert_close(grouped[:, :, head : head + 1], alone)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_a_window_over_the_whole_sequence_is_none_bit_for_bit(backend):
    q, k, v, _ = Case("").inputs()
    wide, none = (attend(q, k, v, Context(), backend=backend, window=window) for window in (217, None))
    assert torch.equal(wide, none)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_positions_without_a_cache_do_not_open_the_mask(backend):
    q, k, v, _ = Case("", queries=17).inputs()
    expected = attend(q, k, v, Context(), backend=backend)
    for positions_BT in (torch.arange(5, 22).expand(2, -1), torch.zeros(2, 17, dtype=torch.long)):
        got = attend(q, k, v, Context(positions_BT=positions_BT), backend=backend)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_the_mask_shows_the_past_of_the_same_document_within_the_window():
    cpu = torch.device("cpu")
    mask = visible(Context(documents_BT=torch.tensor([[0, 0, 1]])), 3, cpu)
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]
    decoding = Context(positions_BT=torch.tensor([[1], [2]]), cache=CACHE)
    assert visible(decoding, 4, cpu)[:, 0, 0].tolist() == [[True, True, False, False], [True] * 3 + [False]]
    assert visible(decoding, 4, cpu, window=2)[1, 0, 0].tolist() == [False, True, True, False]


def test_a_given_mask_takes_the_place_of_the_causal_one_and_keys_may_be_anything():
    q, k, v, _ = Case("", queries=5, keys=9).inputs()
    mask_BTS = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(4)) > 0.5
    mask_BTS[..., 0] = True
    for backend in ("plain", "sdpa", "flash"):
        out = attend(q, k, v, Context(), backend=backend, mask_BTS=mask_BTS)
        seen = mask_BTS[1, 3]
        weights = ((k[1, seen, 2] @ q[1, 3, 2]) / 4).softmax(0)
        torch.testing.assert_close(out[1, 3, 2], weights @ v[1, seen, 2], atol=1e-5, rtol=1e-5)


def test_a_mask_is_made_once_a_forward_pass():
    context = Context(documents_BT=torch.zeros(1, 3, dtype=torch.long))
    cpu = torch.device("cpu")
    assert visible(context, 3, cpu) is visible(context, 3, cpu)
    assert visible(context, 3, cpu) is not visible(context, 3, cpu, window=2)


def test_a_cache_with_documents_or_without_positions_is_not_guessed_at():
    q, k, v, _ = Case("", queries=1, keys=5).inputs()
    with pytest.raises(AssertionError, match="positions"):
        attend(q, k, v, Context(cache=CACHE), backend="sdpa")
    documents = Context(
        positions_BT=torch.tensor([[4], [4]]), documents_BT=torch.zeros(2, 1, dtype=torch.long), cache=CACHE
    )
    with pytest.raises(AssertionError, match="documents"):
        attend(q, k, v, documents, backend="sdpa")


@pytest.mark.parametrize("backend", ["flash", "cudnn", "varlen", "fa3", "fa4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_backend_never_gives_way_silently(backend, dtype):
    q, k, v, _ = Case("").inputs(dtype)
    with pytest.raises(ValueError, match=f"attention backend '{backend}' takes bf16 or fp16 on CUDA"):
        attend(q, k, v, Context(), backend=backend)


@pytest.mark.parametrize(
    ("device", "needs", "chosen"),
    [
        (facts(None, kind="cpu"), (), "sdpa"),
        (facts(None, kind="cpu"), ("window",), "sdpa"),
        (facts(None, kind="cpu"), ("scores",), "plain"),
        (facts(None, kind="mps"), (), "sdpa"),
        (facts((7, 5), "fp16"), (), "sdpa"),
        (facts((8, 0)), (), "flash"),
        (facts((8, 6), "fp16"), (), "flash"),
        (facts((8, 6)), ("scores",), "flex"),
        (facts((8, 9), "fp8"), (), "flash"),
        (facts((8, 9)), ("documents",), "flex"),
        (facts((9, 0)), (), "cudnn"),
        (facts((9, 0)), ("window",), "flex"),
        (facts((9, 0)), ("window", "documents", "scores"), "flex"),
        (facts((9, 0), triton="3.6.0"), ("window", "documents"), "triton"),
        (facts((9, 0), triton="3.6.0"), ("documents",), "triton"),
        (facts((9, 0), triton="3.6.0"), ("window",), "flex"),
        (facts((9, 0), triton="3.6.0"), ("documents", "scores"), "flex"),
        (facts((8, 9), triton="3.6.0"), ("documents",), "flex"),
        (facts((9, 0), "tf32"), (), "sdpa"),
        (facts((9, 0), "fp32"), ("documents",), "sdpa"),
        (facts((9, 0), "fp32"), ("scores",), "plain"),
        (facts((9, 0), None), (), "sdpa"),
        (facts((12, 0)), (), "flash"),
        (facts((12, 0)), ("window",), "flex"),
    ],
)
def test_auto_means_the_fastest_that_runs_and_knows_the_mask(device, needs, chosen, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda name: "is not installed")
    assert choose_backend("auto", device, needs) == chosen
    assert refusal(chosen, device, needs) is None
    part = MultiHead(
        heads=2,
        window=9 if "window" in needs else None,
        scores=(Alibi(),) if "scores" in needs else (),
    )
    device = replace(device, documents="documents" in needs)
    assert part.resolve(device).backend == chosen
    assert part.resolve(device).refusal(device) is None


def test_auto_passes_over_what_is_too_narrow_for_the_heads(monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda name: "is not installed")
    assert choose_backend("auto", facts((9, 0)), width=256) == "flex"
    assert MultiHead(heads=2).resolve(facts((9, 0), dim=512)).backend == "flex"
    assert MultiHead(heads=4).resolve(facts((9, 0), dim=512)).backend == "cudnn"
    assert "width 128 at most and these have 256" in refusal("cudnn", facts((9, 0)), width=256)


def test_an_extra_package_is_taken_where_it_is_there_and_named_with_the_remedy_where_not(monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda name: None)
    assert choose_backend("auto", facts((9, 0)), ("window",)) == "fa3"
    assert choose_backend("auto", facts((9, 0))) == "cudnn"
    assert choose_backend("auto", facts((10, 0))) == "fa4"
    monkeypatch.undo()
    if packages.missing("fa4") is None:
        pytest.skip("FlashAttention-4 is installed here")
    said = refusal("fa4", facts((10, 0)))
    assert said.startswith("attention backend 'fa4' is not installed (pip install 'sabrage[fa4]')")


@pytest.mark.parametrize("backend", [name for name in get_args(Backend) if name != "auto"])
def test_a_named_backend_stays_what_it_is(backend):
    assert choose_backend(backend, facts((9, 0))) == backend
    assert choose_backend(backend, facts(None, kind="cpu"), ("scores",)) == backend


def test_a_named_backend_that_does_not_know_the_mask_is_refused_with_those_that_do():
    said = refusal("cudnn", facts((9, 0)), ("window",))
    assert said == (
        "attention backend 'cudnn' knows no window; use backend=auto, or one of plain, sdpa, flex, triton, "
        "varlen, fa3, fa4"
    )
    part = MultiHead(heads=2, backend="sdpa", scores=(Alibi(),))
    assert "'sdpa' knows no scores" in part.refusal(facts(None, kind="cpu"))
    documents = replace(facts((9, 0)), documents=True)
    assert "'flash' knows no documents" in MultiHead(heads=2, backend="flash").refusal(documents)
    assert "'cudnn' knows no window" in MultiHead(heads=2, backend="cudnn", window_share=0.5).refusal(
        facts((9, 0))
    )
