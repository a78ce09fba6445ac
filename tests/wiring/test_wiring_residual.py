"""The plain residual: the sizes that it notes for the log, and that noting them changes nothing."""

from dataclasses import replace

import pytest
import torch
from contracts import build, draw_tokens, shrink
from torch import nn

from sabrage.context import Context
from sabrage.recipes import find, override
from sabrage.wiring.residual import Residual, ResidualStream
from sabrage.wiring.skip_scales import SkipScales
from sabrage.wiring.skips import Skipping


class Fixed(nn.Module):
    """A block that adds 3 and then -4, whatever it is given."""

    def mixer(self, x_BTD, context):
        return torch.full_like(x_BTD, 3.0)

    def feedforward(self, x_BTD, context):
        return torch.full_like(x_BTD, -4.0)


def test_the_log_shows_how_large_the_stream_and_its_branches_are():
    context = Context()
    ResidualStream(Residual(sizes=True), num_layers=2)(
        torch.full((2, 5, 8), 2.0), [Fixed(), Fixed()], context
    )
    told = {name: value.item() for name, (value,) in context.readings.items()}
    layers = [(0, 2.0), (1, 1.0)]
    assert told == pytest.approx(
        {
            name: size
            for layer, stream in layers
            for name, size in (
                (f"stream {layer:02d}", stream),
                (f"mixer {layer:02d}", 3.0),
                (f"feedforward {layer:02d}", 4.0),
            )
        }
    )


def test_the_mixer_is_noted_as_it_is_added():
    context = Context()
    ResidualStream(Residual(sizes=True, mixer_scale="depth"), num_layers=8)(
        torch.ones(1, 2, 4), [Fixed()], context
    )
    assert context.readings["mixer 00"][0].item() == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    "around", [lambda part: part, lambda part: Skipping(residual=part, skips=(SkipScales(),))]
)
def test_noting_sizes_changes_no_bit_and_is_off_by_default(around):
    spec = shrink(find("base")).model
    outcomes = []
    for sizes in (False, True):
        model = build(replace(spec, wiring=around(Residual(sizes=sizes))))
        context, tokens_BT = Context(), draw_tokens(model)
        h_BTD = model(tokens_BT, context)
        h_BTD.square().mean().backward()
        outcomes.append(
            [h_BTD, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
        )
        assert len(context.readings) == (3 * spec.layers if sizes else 0)
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def test_a_run_logs_them(tiny, run_recipe):
    _, run = run_recipe(override(tiny, "model.wiring.sizes=true"))
    sizes = {
        name for name in run.events("speed")[-1] if name.startswith(("stream ", "mixer ", "feedforward "))
    }
    assert len(sizes) == 3 * tiny.model.layers
    assert run.events("speed")[-1]["stream 00"] > 0
