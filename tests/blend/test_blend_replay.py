from contextlib import nullcontext

import pytest
import torch

from sabrage.blend import replay
from sabrage.blend.replay import CALLS_BEFORE, Replay

CUDA = torch.device("cuda")


class Stream:
    def wait_stream(self, other):
        assert other is not self


def test_off_cuda_it_is_the_work_itself():
    done = []
    again = Replay(lambda: done.append("work"), torch.device("cpu"), clear=lambda: done.append("clear"))
    for _ in range(6):
        again()
    assert done == ["work"] * 6


@pytest.fixture
def done(monkeypatch):
    """What a CUDA that only notes it was asked for."""
    done = []

    class Graph:
        def capture_begin(self, *, capture_error_mode):
            done.append(f"begin {capture_error_mode}")

        def capture_end(self):
            done.append("end")

        def replay(self):
            done.append("replay")

    monkeypatch.setattr(replay.torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(replay.torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(replay.torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(replay.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(replay.torch.cuda, "synchronize", lambda device: done.append("wait"))
    return done


def test_the_fourth_call_is_recorded_and_replayed_from_then_on(done):
    again = Replay(lambda: done.append("work"), CUDA, clear=lambda: done.append("clear"))
    for _ in range(CALLS_BEFORE + 3):
        again()
    recorded = ["clear", "begin thread_local", "work", "end"]
    assert done == ["work"] * CALLS_BEFORE + recorded + ["replay"] * 3
    again.end()
    assert done[-2:] == ["wait", "clear"]
    assert again.graph is None


def test_work_that_cannot_be_recorded_is_done_all_the_same(done):
    def work():
        if done[-1:] == ["begin thread_local"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        done.append("work")

    again = Replay(work, CUDA, clear=lambda: done.append("clear"))
    for _ in range(CALLS_BEFORE):
        again()
    with pytest.warns(UserWarning, match="no CUDA graph, which is slower: operation not permitted"):
        again()
    again()
    failed = ["clear", "begin thread_local", "end", "clear"]
    assert done == ["work"] * CALLS_BEFORE + failed + ["work", "work"]
    again.end()
    assert "wait" not in done


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_optimizer_step_is_the_step():
    def fitted(*, calls_before):
        monkeypatch.setattr(replay, "CALLS_BEFORE", calls_before)
        torch.manual_seed(3)
        layer = torch.nn.Linear(16, 4, device=CUDA)
        rate, x = torch.tensor(0.1, device=CUDA), torch.empty(8, 16, device=CUDA)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, fused=True, capturable=True)

        def update():
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()

        again = Replay(update, CUDA, clear=optimizer.zero_grad)
        for step in range(20):
            x.normal_()
            rate.fill_(0.1 / (1 + step))
            again()
        assert (again.graph is None) == (calls_before > 20)
        again.end()
        return layer.weight.detach().clone()

    with pytest.MonkeyPatch.context() as monkeypatch:
        torch.testing.assert_close(fitted(calls_before=3), fitted(calls_before=100))
