"""Every way to cheat is built here as a part, and must be caught and named; honest parts must pass."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sabrage.attention.multi_head import MultiHead
from sabrage.blend.audit import fault
from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates
from sabrage.config import ConfigError
from sabrage.feedforward.mlp import Mlp
from sabrage.model.ends import LinearHead, Projection, TokenEmbedding, TokenTable
from sabrage.model.legality import examine, quick, scramble, shrink
from sabrage.model.lm import ModelSpec, build_model
from sabrage.parts import Embedding, FeedForward, Head, Mixer, Wiring
from sabrage.precision.autocast import Bf16
from sabrage.recipes import RECIPES
from sabrage.wiring.residual import Residual

HONEST = ModelSpec(
    layers=3,
    dim=16,
    vocab_size=61,
    embedding=TokenTable(),
    mixers=(MultiHead(heads=2),),
    feedforwards=(Mlp(expansion=2),),
    wiring=Residual(),
    head=LinearHead(),
)


def verdict(documents=False, max_length=1024, **changes):
    return quick(replace(HONEST, **changes), max_length=max_length, documents=documents)


def failures(**changes):
    return {check.name: check.detail for check in verdict(**changes).checks if not check.passed}


def module(function, **attributes):
    """A module whose forward is function(module, *inputs)."""

    class Made(nn.Module):
        forward = function

    made = Made()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@dataclass(frozen=True, kw_only=True)
class TestMixer(Mixer):
    __test__ = False

    def build(self, *, dim, layer):
        return module(self.mix, linear=nn.Linear(dim, dim), gate=nn.Parameter(torch.zeros(())))

    @staticmethod
    def mix(self, x, context):
        raise NotImplementedError

    def streams(self, dim):
        return {}

    def flops(self, dim, sequence_length):
        return 0


@dataclass(frozen=True, kw_only=True)
class Bidirectional(TestMixer):
    @staticmethod
    def mix(self, x, context):
        return F.scaled_dot_product_attention(x, x, self.linear(x))


@dataclass(frozen=True, kw_only=True)
class PeeksBehindAZeroGate(TestMixer):
    @staticmethod
    def mix(self, x, context):
        return self.gate * F.pad(self.linear(x)[:, 1:], (0, 0, 0, 1))


@dataclass(frozen=True, kw_only=True)
class Neighbour(TestMixer):
    @staticmethod
    def mix(self, x, context):
        return F.pad(self.linear(x)[:, 1:], (0, 0, 0, 1))


@dataclass(frozen=True, kw_only=True)
class PoolsItsOwnBlock(TestMixer):
    block_size: int = 16

    def build(self, *, dim, layer):
        return module(self.mix, linear=nn.Linear(dim, dim), size=self.block_size)

    @staticmethod
    def mix(self, x, context):
        length = x.shape[1]
        padded = F.pad(x, (0, 0, 0, -length % self.size)).unflatten(1, (-1, self.size))
        pooled = padded.mean(2, keepdim=True).expand_as(padded).flatten(1, 2)[:, :length]
        return self.linear(pooled)


@dataclass(frozen=True, kw_only=True)
class RunningMean(TestMixer):
    """Causal, but blind to documents."""

    @staticmethod
    def mix(self, x, context):
        return self.linear(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


@dataclass(frozen=True, kw_only=True)
class ScalesByLength(TestMixer):
    @staticmethod
    def mix(self, x, context):
        return self.linear(x) / x.shape[1]


@dataclass(frozen=True, kw_only=True)
class RemembersWhatItSaw(TestMixer):
    def build(self, *, dim, layer):
        made = module(self.mix, linear=nn.Linear(dim, dim))
        made.register_buffer("mean", torch.zeros(dim))
        return made

    @staticmethod
    def mix(self, x, context):
        out = self.linear(x - self.mean)
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return out


@dataclass(frozen=True, kw_only=True)
class TestFeedForward(FeedForward):
    __test__ = False

    def flops(self, dim):
        return 0


@dataclass(frozen=True, kw_only=True)
class BatchStatistics(TestFeedForward):
    def build(self, *, dim, layer):
        return module(
            lambda self, x, context: self.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(dim)
        )


@dataclass(frozen=True, kw_only=True)
class FirstComeFirstServed(TestFeedForward):
    """Four experts with room for half of the tokens each, filled in the order of the batch, in training."""

    def build(self, *, dim, layer):
        experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))
        return module(self.route, experts=experts, gate=nn.Linear(dim, 4))

    @staticmethod
    def route(self, x, context):
        flat = x.flatten(0, 1)
        scores = self.gate(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            mine = (scores.argmax(-1) == index).nonzero().flatten()
            if self.training:
                mine = mine[: len(flat) // 2]
            out[mine] = expert(flat[mine]) * scores[mine, index, None]
        return out.view_as(x)


@dataclass(frozen=True, kw_only=True)
class Dropless(FirstComeFirstServed):
    """The honest form: every token reaches its expert."""

    def build(self, *, dim, layer):
        made = super().build(dim=dim, layer=layer)
        for part in made.modules():
            part.train = lambda mode=True: None
            part.training = False
        return made


@dataclass(frozen=True, kw_only=True)
class Dropout(TestFeedForward):
    def build(self, *, dim, layer):
        layers = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.5))
        return module(lambda self, x, context: self.layers(x), layers=layers)


@dataclass(frozen=True, kw_only=True)
class Backflow(Wiring):
    def build(self, *, dim, num_layers, vocab_size):
        plain = Residual().build(dim=dim, num_layers=num_layers, vocab_size=vocab_size)
        return module(
            lambda self, x, blocks, context: (h := self.plain(x, blocks, context)) + h.roll(-1, 1),
            plain=plain,
        )


@dataclass(frozen=True, kw_only=True)
class SeesNextToken(Embedding):
    def build(self, *, dim, vocab_size):
        table = TokenEmbedding(dim=dim, vocab_size=vocab_size)
        made = module(lambda self, tokens, context: F.embedding(tokens + tokens.roll(-1, 1), self.weight))
        made.weight = nn.Parameter(table.weight.repeat(2, 1))
        return made


class ShiftedProjection(Projection):
    def loss(self, h_BTD, targets_BT):
        return super().loss(h_BTD[:, 1:], targets_BT[:, :-1])


@dataclass(frozen=True, kw_only=True)
class ShiftedHead(LinearHead):
    def build(self, *, dim, vocab_size):
        return ShiftedProjection(dim=dim, vocab_size=vocab_size)


class PaddedProjection(Projection):
    def loss(self, h_BTD, targets_BT):
        logits = F.pad(self(h_BTD).flatten(0, -2).float(), (0, 3))
        return F.cross_entropy(logits, targets_BT.flatten(), ignore_index=-1)


@dataclass(frozen=True, kw_only=True)
class PaddedHead(Head):
    def build(self, *, dim, vocab_size):
        return PaddedProjection(dim=dim, vocab_size=vocab_size)

    def flops(self, dim, vocab_size):
        return 0


ALWAYS = {
    "causality",
    "causality by gradient",
    "batch independence",
    "normalisation",
    "evaluation length",
    "evaluation leaves no trace",
}


def test_an_honest_model_passes_every_check_bit_for_bit():
    found = verdict()
    assert found.passed
    assert {check.name for check in found.checks} == ALWAYS
    assert "bit for bit" in found.checks[0].detail


@pytest.mark.parametrize("name", ["demo", "base"])
def test_recipes_are_legal(name):
    assert quick(RECIPES[name].model, max_length=1024).require().passed


def test_dropout_and_exact_routing_are_legal():
    assert not failures(feedforwards=(Dropout(),))
    assert not failures(feedforwards=(Dropless(),))


def test_documents_are_checked_where_they_are_claimed():
    assert "document isolation" in {check.name for check in verdict(documents=True).checks}
    assert not failures(documents=True)
    assert not failures(mixers=(RunningMean(),))


def test_an_unmasked_document_is_caught():
    found = failures(mixers=(MultiHead(heads=2), RunningMean()), documents=True)
    assert set(found) == {"document isolation"}
    assert "blocks.1.mixer (RunningMean) leaks" in found["document isolation"]


@pytest.mark.parametrize(
    ("mixer", "offset"), [(Bidirectional(), 63), (PoolsItsOwnBlock(), 15), (Neighbour(), 1)]
)
def test_a_mixer_that_sees_the_future_is_caught_with_its_layer_and_offset(mixer, offset):
    found = failures(mixers=(MultiHead(heads=2), mixer))
    place = f"blocks.1.mixer ({type(mixer).__name__}) leaks"
    assert f"eval mode: {place}" in found["causality"]
    assert f"(offset +{offset})" in found["causality"]
    assert place in found["causality by gradient"]


def test_a_block_longer_than_usual_is_covered():
    found = failures(mixers=(PoolsItsOwnBlock(block_size=160),))
    assert "the output at 0 depends on the input at 159 (offset +159)" in found["causality"]


def test_a_leak_behind_a_gate_that_starts_at_zero_is_caught():
    assert "PeeksBehindAZeroGate" in failures(mixers=(PeeksBehindAZeroGate(),))["causality"]


def test_short_rows_are_enough_to_catch_a_neighbour():
    assert "(offset +1)" in failures(mixers=(Neighbour(),), max_length=9)["causality"]


def test_batch_statistics_are_caught_in_train_mode():
    found = failures(feedforwards=(BatchStatistics(),))
    for name in ("causality", "batch independence"):
        assert found[name].startswith("train mode: blocks.0.feedforward (BatchStatistics) leaks")


def test_expert_capacity_by_batch_order_is_caught_in_train_mode():
    found = failures(feedforwards=(FirstComeFirstServed(),))["batch independence"]
    assert found.startswith("train mode: blocks.0.feedforward (FirstComeFirstServed) leaks")
    assert "the output of sequence 1 depends on sequence 0" in found


def test_a_leaking_wiring_is_caught():
    found = failures(wiring=Backflow())
    assert "wiring (Backflow) leaks: the output at 62 depends on the input at 63" in found["causality"]
    assert "wiring (Backflow) leaks" in found["causality by gradient"]


def test_an_embedding_of_the_next_token_is_caught():
    found = failures(embedding=SeesNextToken(), head=LinearHead(tied=False))
    assert "embedding (SeesNextToken) leaks" in found["causality"]


def test_a_head_that_shifts_its_targets_is_caught():
    assert set(failures(head=ShiftedHead())) == {"normalisation"}


def test_a_loss_over_more_than_the_vocabulary_is_caught():
    assert "by the softmax of the logits" in failures(head=PaddedHead())["normalisation"]


def test_outputs_that_depend_on_the_length_of_the_row_are_caught():
    assert set(failures(mixers=(ScalesByLength(),))) == {"evaluation length"}


def test_a_model_that_learns_from_what_it_evaluates_is_caught():
    found = failures(mixers=(RemembersWhatItSaw(),))["evaluation leaves no trace"]
    assert found == "evaluating changes the buffer blocks.0.mixer.mean"


def test_a_failure_is_refused_with_every_sentence():
    with pytest.raises(ConfigError, match=r"the model is not legal(.|\n)*causality: (.|\n)*by gradient: "):
        verdict(mixers=(Neighbour(),)).require()


def test_the_random_state_is_left_as_it_was(monkeypatch):
    torch.manual_seed(5)
    # What torch.manual_seed also does, where nobody puts it back.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded every card"))
    before = torch.get_rng_state()
    verdict(feedforwards=(Dropout(),))
    assert fault(Blend(candidates=Candidates(), text_orders=1)) is None
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_under_examination_is_left_as_it_was():
    model = build_model(replace(HONEST, mixers=(RemembersWhatItSaw(),)), seed=0).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examine(model, length=20)
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_shrunken_copy_has_every_part_once():
    pattern = (MultiHead(heads=2), RunningMean(), Neighbour())
    small = shrink(replace(HONEST, layers=12, vocab_size=50257, mixers=pattern))
    assert (small.layers, small.dim, small.vocab_size) == (3, 16, 512)
    assert [type(mixer) for mixer in small.mixers] == [type(mixer) for mixer in pattern]


def test_the_shrunken_copy_is_as_narrow_as_its_parts_allow():
    for heads, dim in ((12, 192), (64, 384), (384, 768)):
        assert shrink(replace(HONEST, dim=768, mixers=(MultiHead(heads=heads),))).dim == dim


def test_a_backend_of_another_device_is_exchanged():
    cards_only = replace(HONEST, mixers=(MultiHead(heads=2, backend="cudnn"),))
    assert shrink(cards_only).mixers[0].backend == "sdpa"


def test_bf16_is_legal_and_its_leaks_are_caught():
    for mixer, passes in ((MultiHead(heads=2), True), (Neighbour(), False)):
        model = scramble(build_model(replace(HONEST, mixers=(mixer,)), seed=0))
        assert examine(model, length=40, precision=Bf16()).passed == passes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_leak_is_caught_on_the_gpu():
    before = torch.cuda.get_rng_state()
    for mixer, passes in ((MultiHead(heads=2), True), (Neighbour(), False)):
        model = scramble(build_model(replace(HONEST, mixers=(mixer,)), seed=0)).cuda()
        assert examine(model, length=80, precision=Bf16()).passed == passes
    assert torch.equal(before, torch.cuda.get_rng_state())
