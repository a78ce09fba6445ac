from dataclasses import replace

import pytest
import torch

from sabrage.optim.muon import Muon
from sabrage.parts import Batch, OptimizerGroup
from sabrage.plan import Stages
from sabrage.train.loop import make_loader
from sabrage.train.warmup import warm_up


@pytest.fixture
def staged(tiny):
    """The tiny recipe with two sequence lengths and two optimizers."""
    plan = replace(tiny.plan, sequence_length=Stages(values=(16, 64), starts=(0, 6)))
    matrices = OptimizerGroup(pattern=r"blocks\..*weight", optimizer=Muon(lr=0.02))
    return replace(tiny, plan=plan, optim=(matrices, *tiny.optim))


def record_shapes(step, *, too_many_tokens=None):
    """Notes the shape of every forward pass; beyond that many tokens memory runs out."""
    shapes, forward = [], step.forward

    def run(tokens_BT, *arguments):
        shapes.append(tuple(tokens_BT.shape))
        if too_many_tokens is not None and tokens_BT.numel() >= too_many_tokens:
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
    evaluator.score = lambda tokens, targets: scored.append(tuple(tokens.shape)) or plain(tokens, targets)
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
