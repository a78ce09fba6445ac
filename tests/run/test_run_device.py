"""Work by one thread, which the checks before a run ask for."""

import pytest
import torch

from sabrage.blend import audit
from sabrage.blend.blend import Blend
from sabrage.model import legality
from sabrage.recipes import find
from sabrage.run.device import one_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_works_inside_and_all_of_them_afterwards_whatever_happens(two_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("module", "name", "check"),
    [
        (audit, "stage", lambda: audit.fault(Blend(text_orders=1))),
        (legality, "examine", lambda: legality.quick(find("demo").model, max_length=64)),
    ],
)
def test_the_checks_before_a_run_work_by_one_thread(two_threads, monkeypatch, module, name, check):
    honest, seen = getattr(module, name), []

    def noted(*given, **named):
        seen.append(torch.get_num_threads())
        return honest(*given, **named)

    monkeypatch.setattr(module, name, noted)
    check()
    assert seen == [1]
    assert torch.get_num_threads() == 2
