"""Latents and pools as they run on a GPU: errors in bf16, decoding in bf16, compiled training."""

from dataclasses import replace

import pytest
import torch
from latent_pages import Paged
from torch._dynamo.utils import counters

from sabrage.attention.near_and_pooled import attend_everywhere
from sabrage.config import resolve
from sabrage.context import Context
from sabrage.generate.cache import DenseCache
from sabrage.model.lm import build_model
from sabrage.optim.muon import Muon
from sabrage.parts import Batch, Knobs, OptimizerGroup
from sabrage.precision.autocast import Bf16
from sabrage.recipes import find
from sabrage.run.device import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
LATENTS, POOLS = ["mla", "mla-small"], ["pool-mean", "pool-max", "pool-reservoir", "pool-latent"]
DIM = 768


def build_mixer(name, *, products="bf16", **changes):
    """The recipe's mixer at its own width, its output projection not zero, as this device runs it in bf16."""
    part = resolve(find(name).model.mixers[0], replace(probe(DEVICE), products=products))
    torch.manual_seed(0)
    return replace(part, zero_init=False, **changes).build(dim=DIM, layer=0).to(DEVICE)


def draw(*shape, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE)


def run(mixer, x_BTD, *, documents_BT=None, autocast, compiled=False):
    """The output and the gradients of the input and of every weight, by name."""
    names, weights = zip(*mixer.named_parameters(), strict=True)
    x_BTD = x_BTD.detach().requires_grad_()
    torch._dynamo.reset()
    forward = torch.compile(mixer, fullgraph=True, dynamic=False) if compiled else mixer
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y_BTD = forward(x_BTD, Context(documents_BT=documents_BT))
    pull = draw(*y_BTD.shape, seed=1).to(y_BTD.dtype)
    gradients = torch.autograd.grad(y_BTD, [x_BTD, *weights], pull)
    return dict(zip(("out", "x", *names), (y_BTD.detach(), *gradients), strict=True))


def assert_small_errors(got, same, exact):
    """Each result errs at most twice as much as the plain form does in the same precision."""
    for name, truth in exact.items():
        error, allowed = ((each[name].float() - truth).abs().max().item() for each in (got, same))
        bound = 2 * allowed + 1e-3 * truth.abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, that of the plain form {allowed:.3g}"


def documents(rows, length):
    """Two or three documents a row, none of whole blocks."""
    time_T, border_B1 = torch.arange(length, device=DEVICE), torch.tensor([[150], [17], [700]], device=DEVICE)
    return ((time_T >= border_B1[:rows]).long() + (time_T >= length - 70)).contiguous()


@pytest.mark.parametrize("length", [217, 1024])
@pytest.mark.parametrize("name", LATENTS)
def test_compiled_latent_attention_errs_at_most_twice_as_much_as_plain_in_bf16(name, length):
    x_BTD = draw(3, length, DIM)
    fused, plain = build_mixer(name), build_mixer(name, backend="plain")
    same = run(plain, x_BTD, autocast=True)
    exact = run(plain, x_BTD, autocast=False)
    assert_small_errors(run(fused, x_BTD, autocast=True, compiled=True), same, exact)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [217, 1024])
@pytest.mark.parametrize("name", POOLS)
def test_compiled_pooled_attention_errs_at_most_twice_as_much_as_its_specification(
    name, length, with_documents, monkeypatch
):
    x_BTD, mixer = draw(3, length, DIM), build_mixer(name)
    documents_BT = documents(3, length) if with_documents else None
    got = run(mixer, x_BTD, documents_BT=documents_BT, autocast=True, compiled=True)
    monkeypatch.setattr("sabrage.attention.pooled.attend_by_blocks", attend_everywhere)
    same, exact = (run(mixer, x_BTD, documents_BT=documents_BT, autocast=each) for each in (True, False))
    assert_small_errors(got, same, exact)


@pytest.mark.parametrize("new_tokens", [1, 2])
@pytest.mark.parametrize("name", LATENTS)
@torch.no_grad()
def test_decoding_from_pages_in_bf16_is_as_close_to_fp32_as_the_whole_pass(name, new_tokens):
    mixer, x_BTD, lengths = build_mixer(name), draw(3, 180, DIM), [170, 63, 5]
    assert mixer.kernel
    starts_B1 = torch.tensor(lengths, device=DEVICE)[:, None]
    index_BT = starts_B1 + torch.arange(new_tokens, device=DEVICE)
    exact_BTD = build_mixer(name, products="fp32")(x_BTD, Context())
    mixer, x_BTD = mixer.bfloat16(), x_BTD.bfloat16()
    # Tables of angles are fp32 in bf16 models too.
    mixer.rotary = find(name).model.mixers[0].rotary.build(mixer.rotary_width).to(DEVICE)
    cache = Paged(mixer.compress(x_BTD, Context()), lengths)
    index_BTD = index_BT[..., None].expand(-1, -1, DIM)
    got = mixer(x_BTD.gather(1, index_BTD), Context(positions_BT=index_BT, cache=cache))
    exact, same = (each.gather(1, index_BTD).float() for each in (exact_BTD, mixer(x_BTD, Context())))
    error, allowed = ((each.float() - exact).abs().max().item() for each in (got, same))
    assert error <= 2 * allowed + 1e-3, f"error {error:.3g}, that of the whole pass in bf16 {allowed:.3g}"


@pytest.mark.parametrize("name", [*LATENTS, *POOLS])
@torch.no_grad()
def test_decoding_in_bf16_is_as_close_to_fp32_as_the_whole_pass(name):
    spec = resolve(replace(find(name).model, layers=2), replace(probe(DEVICE), products="bf16"))
    model = build_model(spec, seed=0).to(DEVICE).eval()
    tokens_BT = torch.randint(spec.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.mixer.out.weight, std=DIM**-0.5)
        torch.nn.init.normal_(block.feedforward.down.weight, std=(4 * DIM) ** -0.5)
    wide = resolve(replace(find(name).model, layers=2), replace(probe(DEVICE), products="fp32"))
    exact_model = build_model(wide, seed=0).to(DEVICE).eval()
    exact_model.load_state_dict(model.state_dict())
    exact = exact_model.logits(tokens_BT)
    cache = DenseCache(spec, batch=2, capacity=300, device=DEVICE, dtype=torch.bfloat16)
    pieces = []
    # A prompt, a chunk in the expanded form, a few tokens and then one at a time across a block's border.
    with torch.autocast(DEVICE, torch.bfloat16):
        whole = model.logits(tokens_BT)
        for new_BT in tokens_BT.split([100, 90, 5, *[1] * 105], dim=1):
            start, length = cache.length, new_BT.shape[1]
            positions_BT = torch.arange(start, start + length, device=DEVICE).expand(2, -1)
            pieces.append(model.logits(new_BT, Context(positions_BT=positions_BT, cache=cache)))
            cache.advance(length)
    decoded = torch.cat(pieces, dim=1)
    error, allowed = ((each.float() - exact).abs().max().item() for each in (decoded, whole))
    assert error <= 2 * allowed, f"error {error:.3g}, that of the whole pass in bf16 {allowed:.3g}"


@pytest.mark.parametrize("name", [*LATENTS, *POOLS])
def test_a_training_step_compiles_to_one_graph_that_learns_and_is_never_compiled_again(name, tiny, assemble):
    mixer = replace(find(name).model.mixers[0], heads=2)
    matrices = OptimizerGroup(pattern=r"blocks\..*weight", optimizer=Muon(lr=0.02))
    recipe = replace(
        tiny,
        model=replace(tiny.model, dim=64, mixers=(mixer,)),
        precision=Bf16(),
        optim=(matrices, *tiny.optim),
        plan=replace(tiny.plan, sequence_length=128, tokens_per_step=512),
    )
    torch._dynamo.reset()
    _, step, _ = assemble(resolve(recipe, probe(DEVICE)), micro_rows=2, device=DEVICE, compile=True)
    tokens_BT = torch.randint(257, (4, 129), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
    knobs = Knobs(step=0, lr=1.0, sequence_length=128, tokens_per_step=512)
    first = step(batch, knobs)
    graphs = counters["stats"]["unique_graphs"]
    for number in range(1, 20):
        last = step(batch, replace(knobs, step=number))
    assert last < first - 0.3
    assert counters["stats"]["unique_graphs"] == graphs
