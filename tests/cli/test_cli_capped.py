from types import SimpleNamespace

import pytest
import torch

from sabrage.cli import capped


@pytest.fixture
def card(monkeypatch):
    """A card of 80 GiB; the list gets the shares that are asked for."""
    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    whole = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    return shares


def test_a_command_runs_in_its_part_of_the_memory(card, capsys):
    assert capped.run(["20", "list"]) == 0
    assert card == [0.25]
    assert "nocap-mini" in capsys.readouterr().out


@pytest.mark.parametrize("gib", ["0", "81"])
def test_a_part_that_is_none_is_refused(gib, card, capsys):
    assert capped.run([gib, "list"]) == 1
    assert f"got a cap of {gib} GiB, allowed: above 0, up to the 80.0" in capsys.readouterr().err
    assert card == []


@pytest.mark.parametrize("words", [[], ["22"], ["train", "demo"], ["22GB", "train", "demo"]])
def test_wrong_usage_is_told(words, card, capsys):
    assert capped.run(words) == 2
    assert "usage:" in capsys.readouterr().err


def test_without_a_card_there_is_nothing_to_cap(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert capped.run(["22", "train", "demo"]) == 1
    assert "torch sees none" in capsys.readouterr().err
