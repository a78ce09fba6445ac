import pytest
import torch
from torch import nn

from sabrage.config import ConfigError, from_json, to_json
from sabrage.optim.muon import Muon
from sabrage.parts import Optimizer


def test_update_scales_follow_the_shape():
    scales = {
        name: (Muon(lr_scale=name).scale(3072, 768), Muon(lr_scale=name).scale(768, 3072))
        for name in ("spectral", "longer", "match_rms_adamw", "none")
    }
    assert scales["spectral"] == (2.0, 1.0)
    assert scales["longer"] == (2.0, 2.0)
    assert scales["match_rms_adamw"] == pytest.approx((0.2 * 3072**0.5,) * 2)
    assert scales["none"] == (1.0, 1.0)


def test_parameters_that_are_no_matrices_are_refused():
    with pytest.raises(ConfigError, match=r"'gain' is \(8,\): give it to another"):
        Muon().build([("gain", nn.Parameter(torch.zeros(8)))])
    with pytest.raises(ConfigError, match=r"cuts 'qkv' into 3 matrices, but it has 8 rows"):
        Muon().build([("qkv", nn.Parameter(torch.zeros(8, 8)))])


def test_torchs_own_way_to_load_state_is_refused_because_it_would_be_ignored():
    optimizer = Muon().build([("w", nn.Parameter(torch.zeros(2, 2)))])
    with pytest.raises(NotImplementedError, match="load_state_tensors"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_muon_survives_json_and_names_bad_values():
    part = Muon(stacks=(("qkv", 3), ("gate_up", 2)), every=2, normuon=True, evens="longer")
    assert from_json(to_json(part), Optimizer) == part
    assert part.problems() == []
    bad = Muon(momentum=1.0, every=0, steps=0, variance_decay=-0.1)
    assert [sentence.partition("=")[0] for sentence in bad.problems()] == [
        "Muon.steps",
        "Muon.every",
        "Muon.momentum",
        "Muon.variance_decay",
    ]
    assert Muon(variance_decay=1.0).problems() == ["Muon.variance_decay=1.0, allowed: from 0 to below 1"]
    assert Muon(variance_decay=0.0).problems() == []
