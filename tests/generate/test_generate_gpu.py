"""The engine on CUDA: a recorded step is the step, pages change nothing, and only reading tokens waits."""

from dataclasses import replace

import pytest
import torch
from contracts import build, draw_tokens, shrink

from sabrage.config import resolve
from sabrage.context import Context
from sabrage.generate.engine import Engine, Request
from sabrage.generate.paged import PagedCache
from sabrage.generate.pages import Sequence
from sabrage.generate.sampling import Sampling
from sabrage.generate.text import narrow
from sabrage.recipes import RECIPES, find
from sabrage.run.device import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = ("attention-gate", "attention-scale", "exclusive-self", "paired-heads", "key-offset", "copying")
NAMES = [name for name in ("base", "gqa", "mla", *OPTIONS) if name in RECIPES]
SAMPLINGS = [Sampling(temperature=0), Sampling(top_p=0.9, repetition_penalty=1.1), Sampling(temperature=0.7)]


def model_of(name, dtype=torch.float32):
    """The tiny model of a recipe on the device."""
    spec = resolve(shrink(find(name)).model, replace(probe("cuda"), products="bf16"))
    return narrow(build(spec).cuda(), dtype)


def texts(engine):
    """What six requests of different lengths get, more than there are rows."""
    for n in range(6):
        prompt = tuple(range(1, 3 + 9 * n))
        engine.submit(Request(prompt=prompt, max_tokens=20 + 5 * n, seed=n, sampling=SAMPLINGS[n % 3]))
    found = {n: [] for n in range(6)}
    for event in engine.run():
        found[event.request].append(event.token)
    return found


@pytest.mark.parametrize("pages", [None, 8], ids=["dense", "paged"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_writes_what_the_same_step_writes_unrecorded(name, pages):
    model = model_of(name)
    engines = [Engine(model, rows=3, capacity=100, num_pages=pages) for _ in range(2)]
    engines[1].decode.graphs = None
    recorded, plain = map(texts, engines)
    assert recorded == plain
    # Two widths, with and without cuts.
    assert len(engines[0].decode.graphs) >= 3


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_paged_equals_dense_in_bf16(name):
    """Up to kernels of their own: no further from each other than bf16 is from fp32."""
    logits = {}
    for cache_name, dtype, pages in (
        ("exact", torch.float32, {"num_pages": 3, "page_size": 128}),
        ("dense", torch.bfloat16, {"num_pages": 3, "page_size": 128}),
        ("paged", torch.bfloat16, {"num_pages": 6}),
    ):
        model = model_of(name, dtype)
        cache = PagedCache(model.spec, device="cuda", dtype=dtype, **pages)
        tokens_BT = draw_tokens(model).cuda()
        rows, view = [Sequence() for _ in tokens_BT], cache.view(rows=3, max_length=128)
        for sequence in rows:
            cache.reserve(sequence, 64)
        made = []
        for piece_BT in tokens_BT.split([40, *[1] * 20, 4], dim=1):
            view.load(rows, [piece_BT.shape[1]] * 3, width=64)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                context = Context(positions_BT=view.begin(piece_BT.shape[1]), cache=view)
                made.append(model.logits(piece_BT, context))
            for sequence in rows:
                sequence.length += piece_BT.shape[1]
        logits[cache_name] = torch.cat(made, dim=1).float()
    rounding = (logits["dense"] - logits["exact"]).norm()
    assert (logits["paged"] - logits["exact"]).norm() <= 1.5 * rounding
    assert (logits["paged"] - logits["dense"]).norm() <= 1.5 * rounding


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "plain"])
@pytest.mark.parametrize("pages", [None, 8], ids=["dense", "paged"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing_until_its_tokens_are_read(name, pages, recorded):
    engine = Engine(model_of(name, torch.bfloat16), rows=2, capacity=100, num_pages=pages)
    if not recorded:
        engine.decode.graphs = None
    for seed in range(2):
        engine.submit(Request(prompt=(1, 2, 3), max_tokens=60, seed=seed, sampling=Sampling(top_k=20)))
    for _ in range(4):
        engine.step()
    sequences = [row.sequence for row in engine.rows]
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.view.load(sequences, [1, 1], width=64)
        engine.sampler.advance([0, 1])
        tokens_B = engine.decode()
        with pytest.raises(RuntimeError, match="synchroniz"):
            tokens_B.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_chunked_prompt_and_rows_that_stand_idle_change_no_token():
    model = model_of("base")
    request = Request(prompt=tuple(range(1, 60)), max_tokens=30, sampling=Sampling(temperature=0))
    found = []
    for rows, pages, chunk in ((1, None, 512), (1, 4, 512), (4, 4, 7)):
        engine = Engine(model, rows=rows, capacity=100, num_pages=pages, chunk=chunk)
        engine.submit(request)
        found.append([event.token for event in engine.run()])
    assert found[0] == found[1] == found[2]
