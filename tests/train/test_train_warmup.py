from dataclasses import dataclass, field, replace

import pytest
import torch

from sabrage.optim.muon import Muon
from sabrage.parts import Batch, OptimizerGroup
from sabrage.plan import Stages
from sabrage.train.loop import make_loader
from sabrage.train.warmup import remembered, warm_up
from sabrage.train.world import World


@pytest.fixture
def staged(tiny):
    """The tiny recipe with two sequence lengths and two optimizers."""
    plan = replace(tiny.plan, sequence_length=Stages(values=(16, 64), starts=(0, 6)))
    matrices = OptimizerGroup(pattern=r"blocks\..*weight", optimizer=Muon(lr=0.02))
    return replace(tiny, plan=plan, optim=(matrices, *tiny.optim))


def record_shapes(step, *, too_many_tokens=None, only_length=None):
    """Notes the shape of every forward pass; from that many tokens on memory runs out, in rows of any length
    or of `only_length`."""
    shapes, forward = [], step.forward

    def run(tokens_BT, *arguments):
        shapes.append(tuple(tokens_BT.shape))
        concerned = only_length in (None, tokens_BT.shape[1])
        if too_many_tokens is not None and concerned and tokens_BT.numel() >= too_many_tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(tokens_BT, *arguments)

    step.forward = run
    return shapes


def snapshot(session):
    return {name: tensor.clone() for name, tensor in session.tensors().items()}


def assert_same(session, before):
    after = session.tensors()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


@pytest.mark.parametrize("used", [False, True])
def test_warming_up_leaves_everything_bit_for_bit_as_it_was(staged, assemble, used):
    session, step, evaluator = assemble(staged)
    if used:
        with make_loader(staged, staged.data.open(), step.world, step=0, block=0) as loader:
            step(Batch(*next(loader)), staged.plan.at(0))
        session.step, session.block = 1, 1
    before = snapshot(session)
    pointers = [parameter.data_ptr() for parameter in session.learner.parameters()]
    warm_up(session, step, staged.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    assert_same(session, before)
    assert session.values() == ({"step": 1, "block": 1} if used else {"step": 0, "block": 0})
    # In place, so that compiled graphs and captured pointers stay valid.
    assert [parameter.data_ptr() for parameter in session.learner.parameters()] == pointers
    assert all(parameter.grad is None for parameter in session.learner.parameters())
    assert session.learner.training


def test_what_is_remembered_is_the_same_and_zeros_take_no_memory():
    for tensor in (torch.randn(3, 4), torch.zeros(3, 4), -torch.zeros(3), torch.arange(3), torch.zeros(0)):
        kept = remembered(tensor)
        assert (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(kept, tensor)
        assert torch.equal(kept.signbit(), tensor.signbit())
        assert kept.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert remembered(torch.zeros(1000, 1000)).untyped_storage().nbytes() == 4
    # Its zeros are of both signs.
    assert remembered(torch.tensor([0.0, -0.0])).untyped_storage().nbytes() == 8


def test_a_warmed_up_run_takes_the_same_course(staged, assemble):
    def course(*, warmed):
        session, step, evaluator = assemble(staged)
        if warmed:
            warm_up(session, step, staged.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)

        with make_loader(staged, staged.data.open(), step.world, step=0, block=0) as loader:
            return [step(Batch(*next(loader)), staged.plan.at(number)).item() for number in range(12)]

    assert course(warmed=True) == course(warmed=False)


def test_every_shape_of_the_plan_is_run(staged, assemble):
    session, step, evaluator = assemble(staged, micro_rows=4)
    shapes = record_shapes(step)
    scored = []
    plain = evaluator.score
    evaluator.score = lambda *given: scored.append(tuple(given[0].shape)) or plain(*given)
    warm_up(session, step, staged.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    assert set(shapes) == {(4, 16), (1, 64)}
    assert scored == [(2, 32)]


def test_out_of_memory_halves_the_micro_batch_and_names_the_remedy(tiny, assemble):
    session, step, evaluator = assemble(tiny, micro_rows=4)
    before, said = snapshot(session), []
    shapes = record_shapes(step, too_many_tokens=64)
    fits = warm_up(session, step, tiny.plan.stages(), evaluator, vocab_size=257, say=said.append)
    assert fits == step.micro_tokens == 32
    assert sorted(set(shapes), reverse=True) == [(4, 32), (2, 32), (1, 32)]
    assert ["--set runtime.micro_batch=2" in said[0], "--set runtime.micro_batch=1" in said[1]] == [
        True,
        True,
    ]
    assert len(said) == 2
    assert evaluator.batch_rows == 1
    assert_same(session, before)


def test_one_row_that_does_not_fit_is_an_error_with_the_remedy(tiny, assemble):
    session, step, evaluator = assemble(tiny, micro_rows=4)
    record_shapes(step, too_many_tokens=1)
    with pytest.raises(ValueError, match=r"one row of 32 tokens does not fit .*--set model.layers"):
        warm_up(session, step, tiny.plan.stages(), evaluator, vocab_size=257, say=lambda text: None)


def test_after_halving_every_stage_runs_in_the_shape_that_its_steps_will_have(staged, assemble):
    session, step, evaluator = assemble(staged, micro_rows=8)
    said = []
    shapes = record_shapes(step, too_many_tokens=128, only_length=64)
    warm_up(session, step, staged.plan.stages(), evaluator, vocab_size=257, say=said.append)
    assert len(said) == 1
    warmed = set(shapes)
    shapes.clear()
    with make_loader(staged, staged.data.open(), step.world, step=0, block=0) as loader:
        for number in range(staged.plan.steps):
            step(Batch(*next(loader)), staged.plan.at(number))
    assert set(shapes) == {(4, 16), (1, 64)}
    assert set(shapes) <= warmed


def test_the_rows_announced_are_those_that_a_step_is_cut_into(tiny, assemble):
    plan = replace(tiny.plan, tokens_per_step=6 * 32)
    session, step, evaluator = assemble(replace(tiny, plan=plan), micro_rows=5)
    said = []
    shapes = record_shapes(step, too_many_tokens=3 * 32)
    warm_up(session, step, plan.stages(), evaluator, vocab_size=257, say=said.append)
    # Of six rows five are no micro-batch, and three are too many already.
    assert dict.fromkeys(shapes) == dict.fromkeys([(3, 32), (1, 32)])
    assert step.micro_tokens == 32
    assert len(said) == 1
    assert "1 rows of 32 tokens a micro-batch" in said[0]
    assert "--set runtime.micro_batch=1)" in said[0]


def test_the_setting_announced_counts_rows_of_the_longest_sequences(staged, assemble):
    session, step, evaluator = assemble(staged, micro_rows=8)
    said = []
    record_shapes(step, too_many_tokens=128, only_length=16)
    warm_up(session, step, staged.plan.stages(), evaluator, vocab_size=257, say=said.append)
    assert "4 rows of 16 tokens a micro-batch" in said[0]
    assert "--set runtime.micro_batch=1)" in said[0]


def shrink_memory_of(evaluator, *, rows):
    """Memory for scoring runs out at that many rows."""
    score = evaluator.score

    def run(tokens_BT, *arguments):
        if len(tokens_BT) >= rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return score(tokens_BT, *arguments)

    evaluator.score = run


def test_out_of_memory_in_scoring_halves_its_rows_with_a_message(tiny, assemble):
    session, step, evaluator = assemble(tiny, micro_rows=4)
    before, expected, said = snapshot(session), evaluator(), []
    shrink_memory_of(evaluator, rows=2)
    warm_up(session, step, tiny.plan.stages(), evaluator, vocab_size=257, say=said.append)
    assert evaluator.batch_rows == 1
    assert [text.partition(";")[0] for text in said] == ["out of memory in validation"] * 2
    assert step.micro_tokens == 4 * 32
    assert evaluator() == pytest.approx(expected, rel=1e-6)
    assert_same(session, before)


def test_one_row_that_cannot_be_scored_is_an_error_with_the_remedy(tiny, assemble):
    session, step, evaluator = assemble(tiny, micro_rows=4)
    shrink_memory_of(evaluator, rows=1)
    with pytest.raises(
        ValueError, match=r"scoring one row of 32 tokens .* shorter budget\.evaluation_length"
    ):
        warm_up(session, step, tiny.plan.stages(), evaluator, vocab_size=257, say=lambda text: None)


@dataclass(frozen=True)
class Two(World):
    """One of two processes, of which the other has run out of memory in the trials of these numbers."""

    size: int = 2
    short: tuple[int, ...] = ()
    asked: list = field(default_factory=list)

    def average(self, tensors):
        assert self.size == 1, "a collective inside a trial"

    def any(self, flag):
        self.asked.append(flag)
        return flag or len(self.asked) - 1 in self.short


def test_all_processes_halve_together_and_no_trial_holds_a_collective(tiny, assemble):
    plan = replace(tiny.plan, tokens_per_step=256)
    session, step, evaluator = assemble(replace(tiny, plan=plan), micro_rows=4)
    world = step.world = evaluator.world = Two(torch.device("cpu"), short=(0, 2))
    shapes, said = record_shapes(step), []
    warm_up(session, step, plan.stages(), evaluator, vocab_size=257, say=said.append)
    # This process itself has memory enough: it follows the other in training and in scoring.
    assert list(dict.fromkeys(shapes)) == [(4, 32), (2, 32)]
    assert evaluator.batch_rows == 1
    assert len(said) == 2
    assert world.asked == [False] * 4
    assert step.world is world
