"""Fused attention on the device: errors against the fp32 reference, one graph, what the extras say."""

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, DOCUMENTS, Case

from sabrage.attention import packages
from sabrage.attention.backends import KNOWS, attend, refusal
from sabrage.attention.dense import repeated
from sabrage.attention.masks import distances, visible
from sabrage.attention.multi_head import MultiHead
from sabrage.attention.scores import Alibi, RelativeBias
from sabrage.context import Context
from sabrage.run.device import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="fused attention needs a CUDA device"),
]
# Compiling is what takes time: the wider head is held to what differs in kind.
WIDE = ("causal", "grouped", "documents and window", "alibi of six heads in a window", "learned bias")
SIZED = [(case, 64) for case in CASES] + [(case, 128) for case in CASES if case.name in WIDE]
FUSED = [name for name in KNOWS if name not in ("plain", "sdpa")]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """The compiler takes few shapes of one function and refuses the next."""
    torch.compiler.reset()


def require(backend, width=64):
    reason = refusal(backend, replace(probe("cuda"), products="bf16"), width=width)
    if reason:
        pytest.skip(reason)


def same_precision(q_BTHK, k_BSGK, v_BSGX, context, *, backend, window, scores):
    """The reference's formula with both products in the inputs' precision."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGX))
    k, v = (repeated(x, q.shape[1]) for x in (k, v))
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    head_H11 = torch.arange(q.shape[1], device=q.device)[:, None, None]
    for module in scores:
        distance = distances(context, k.shape[2], q.device)[:, None]
        score = module.function(k.shape[2])(score, head_H11, distance).to(q.dtype)
    mask = visible(context, k.shape[2], q.device, window=window)
    return (score.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("case", "width"), SIZED, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("backend", ["sdpa", *FUSED])
def test_it_errs_at_most_twice_as_much_as_torch_in_the_same_precision(backend, case, width):
    """Where a backend gives way, in decoding and under masks that it does not know, what it gives way to."""
    require(backend, width)
    case = replace(case, width=width)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    got = case.run(backend, **options)
    torchs = case.run(backend, attention=same_precision, **options)
    exact = case.run("plain", rounded=torch.bfloat16, device="cuda")
    for name, truth in exact.items():
        error, allowed = ((x[name].float() - truth).abs().max().item() for x in (got, torchs))
        assert error <= 2 * allowed + 5e-4, f"{name}: error {error:.3g}, that of torch in bf16 {allowed:.3g}"


@pytest.mark.parametrize("backend", FUSED)
def test_a_layer_trains_in_one_graph_and_as_it_does_uncompiled(backend):
    require(backend)
    knows = KNOWS[backend]
    part = MultiHead(
        heads=4,
        kv_heads=2,
        backend=backend,
        window=100 if "window" in knows else None,
        scores=(Alibi(), RelativeBias()) if "scores" in knows else (),
    )
    torch.manual_seed(0)
    layer = part.build(dim=256, layer=0).to("cuda")
    documents_BT = Case("", documents=DOCUMENTS).context("cuda").documents_BT
    x_BTD = torch.randn(2, 217, 256, device="cuda")

    def forward(x_BTD, documents_BT):
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x_BTD, Context(documents_BT=documents_BT))

    compiled = torch.compile(forward, fullgraph=True, dynamic=False)
    found = []
    for function in (forward, compiled):
        layer.zero_grad()
        out = function(x_BTD, documents_BT if "documents" in knows else None)
        out.float().square().sum().backward()
        found.append([out.float(), *(parameter.grad for parameter in layer.parameters())])
    for plain, fast in zip(*found, strict=True):
        assert (fast - plain).norm() <= 0.02 * plain.norm()


def test_new_documents_compile_nothing_new_and_wait_for_nothing():
    layer = MultiHead(heads=4, backend="flex").build(dim=256, layer=0).to("cuda", torch.bfloat16)
    compiled = torch.compile(
        lambda x, documents: layer(x, Context(documents_BT=documents)), fullgraph=True, dynamic=False
    )
    x_BTD = torch.randn(2, 512, 256, device="cuda", dtype=torch.bfloat16)
    batches = [torch.arange(1024, device="cuda").view(2, 512) // size for size in (50, 77, 300)]
    compiled(x_BTD, batches[0]).sum().backward()
    torch.cuda.synchronize()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for documents_BT in batches[1:]:
            compiled(x_BTD, documents_BT).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_more_documents_than_there_is_room_for_give_no_number_rather_than_a_wrong_one():
    q, k, v, _ = Case("", queries=256, width=64).inputs(torch.bfloat16, "cuda")
    documents_BT = torch.arange(512, device="cuda").view(2, 256) // 3
    out = attend(q, k, v, Context(documents_BT=documents_BT), backend="varlen")
    assert out.isnan().all()


@pytest.mark.parametrize("name", packages.MODULES)
def test_a_package_runs_or_says_why_not(name):
    reason = packages.missing(name)
    assert reason is None or reason.split()[0] in ("is", "needs", "fails")


@pytest.mark.parametrize("length", [2048, 8192])
def test_documents_compiled_without_gradients_are_seen_as_the_mask_says(length):
    """As in validation: layers of two windows, and documents that the compiler knows nothing about."""
    torch.manual_seed(0)
    parts = [MultiHead(heads=2, qk_norm=True, window=window, backend="flex") for window in (512, 2048)]
    layers = [part.build(dim=256, layer=index).cuda().eval() for index, part in enumerate(parts)]
    rows = 16_384 // length
    x_BTD = torch.randn(rows, length, 256, device="cuda")
    documents_BT = (torch.rand(rows, length, device="cuda") < 1 / 400).cumsum(1, dtype=torch.int32)

    def forward(x_BTD, documents_BT):
        context = Context(documents_BT=documents_BT)
        with torch.autocast("cuda", torch.bfloat16):
            for layer in layers:
                x_BTD = x_BTD + layer(x_BTD, context)
        return x_BTD

    with torch.no_grad():
        found = torch.compile(forward, fullgraph=True, dynamic=False)(x_BTD, documents_BT)
        for layer in layers:
            layer.part = replace(layer.part, backend="sdpa")
        expected = torch.cat(
            [forward(x_BTD[row : row + 1], documents_BT[row : row + 1]) for row in range(rows)]
        )
    assert (found - expected).norm() <= 0.02 * (expected - x_BTD).norm()
