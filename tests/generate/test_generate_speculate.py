"""Speculation changes the speed and nothing else: greedy tokens, distributions, ends and refusals."""

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from objectives import weighted

from sabrage.attention.multi_head import MultiHead
from sabrage.cli import main
from sabrage.config import ConfigError, override
from sabrage.feedforward.mlp import Mlp
from sabrage.generate.sampling import Sampling
from sabrage.generate.speculate import Drafter, Tally, acceptance, load_drafter, remainder, speculate, verify
from sabrage.generate.text import generate
from sabrage.model.lm import build_model
from sabrage.objective.sequential import SequentialAhead

GREEDY = Sampling(temperature=0)
PROMPTS = ([3], [256, 84, 104], [1, 2, 3, 4, 5, 6, 7, 8, 9])


def sequential(depth):
    return SequentialAhead(depth=depth, mixer=MultiHead(heads=2), feedforward=Mlp())


def drafter_of(spec, depth, *, seed=5):
    part = sequential(depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = part.build(dim=spec.dim, vocab_size=spec.vocab_size)
    layers = replace(spec, layers=depth, mixers=(part.mixer,), feedforwards=(part.feedforward,))
    return Drafter(module.eval(), layers)


@pytest.fixture
def model(tiny, one_thread):
    """The tiny model with weights large enough that its choices differ."""
    made = build_model(tiny.model, seed=1).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


class Oracle:
    """Drafts with the model itself: what it is told of the text, read from the start each time."""

    def __init__(self, prompt):
        self.text = dict(enumerate(prompt))

    def draft(self, index, h_BTD, tokens_BT, model, context):
        positions = (context.positions_BT[0] + 1 + index).tolist()
        self.text |= dict(zip(positions, tokens_BT[0].tolist(), strict=True))
        text = [self.text[position] for position in range(positions[-1] + 1)]
        return model(torch.tensor([text]))[:, -len(positions) :]


class Contrarian(Oracle):
    """Drafts what the model finds least likely."""

    def draft(self, index, h_BTD, tokens_BT, model, context):
        return -super().draft(index, h_BTD, tokens_BT, model, context)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_speculation_writes_the_tokens_of_plain_decoding(model, prompt, depth):
    expected = list(generate(model, prompt, max_tokens=40, sampling=GREEDY))
    for drafter in (
        drafter_of(model.spec, depth),
        Drafter(Oracle(prompt), drafter_of(model.spec, depth).spec),
        Drafter(Contrarian(prompt), drafter_of(model.spec, depth).spec),
    ):
        for count in (1, 2, 39, 40):
            found = list(speculate(model, drafter, prompt, max_tokens=count, sampling=GREEDY))
            assert found == expected[:count]
    assert len(set(expected)) > 5


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_drafter_as_good_as_the_model_is_always_believed_and_a_bad_one_never(model, temperature, depth):
    spec, sampling = drafter_of(model.spec, depth).spec, Sampling(temperature=temperature)
    good, bad = Tally(), Tally()
    for tally, kind in ((good, Oracle), (bad, Contrarian)):
        drafter = Drafter(kind([7, 8]), spec)
        list(speculate(model, drafter, [7, 8], max_tokens=41, sampling=sampling, tally=tally))
    assert good.accepted == good.drafted == 40 - good.passes
    assert good.acceptance == 1
    assert good.passes == math.ceil(40 / (depth + 1))
    if temperature == 0:
        assert (bad.accepted, bad.passes, bad.acceptance) == (0, 40, 0)
    else:
        assert bad.acceptance < 0.5


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_in_rounds_are_those_of_the_module_on_the_whole_text(model, depth):
    """The drafter's cache and its going back leave no trace: each draft is that of a pass over all tokens."""
    prompt, drafter = [7, 8, 9], drafter_of(model.spec, depth)
    text = [*prompt, *generate(model, prompt, max_tokens=20, sampling=GREEDY)]
    drafted, plain_draft = {}, drafter.module.draft

    def noting(index, h_BTD, tokens_BT, *rest):
        made_BTD = plain_draft(index, h_BTD, tokens_BT, *rest)
        position = int(rest[1].positions_BT[0, -1])
        drafted[index, position] = tokens_BT[0, -1], made_BTD[0, -1]
        return made_BTD

    drafter.module.draft = noting
    list(speculate(model, drafter, prompt, max_tokens=20, sampling=GREEDY))
    from sabrage.context import Context

    with torch.no_grad():
        h_BTD = model(torch.tensor([text[: len(text) - depth]]))
        for index in range(depth):
            follow = text[1 + index : len(text) - depth + 1 + index]
            h_BTD = plain_draft(index, h_BTD, torch.tensor([follow]), model, Context())
            # A deeper block may have read a draft that the text has not: those are left out.
            same = [p for (i, p), (token, _) in drafted.items() if i == index and token == follow[p]]
            assert len(same) > (10 if index == 0 else -1)
            for position in same:
                torch.testing.assert_close(
                    drafted[index, position][1], h_BTD[0, position], atol=1e-5, rtol=1e-5
                )


def distributions(seed):
    generator = torch.Generator().manual_seed(seed)
    p_V, q_V = torch.randn(2, 6, generator=generator).mul(2).double().softmax(-1)
    q_V[seed % 6] = 0
    p_V[(seed + 1) % 6] = 0
    return p_V / p_V.sum(), q_V / q_V.sum()


@pytest.mark.parametrize("seed", range(6))
def test_the_rule_of_acceptance_gives_the_models_distribution_exactly(seed):
    p_V, q_V = distributions(seed)
    kept_V = q_V * acceptance(p_V, q_V)
    found_V = kept_V + (1 - kept_V.sum()) * remainder(p_V, q_V)
    torch.testing.assert_close(found_V, p_V, atol=1e-12, rtol=0)


def test_equal_distributions_keep_every_draft_and_leave_a_distribution():
    p_V, _ = distributions(0)
    assert acceptance(p_V, p_V)[p_V > 0].tolist() == [1.0] * 5
    torch.testing.assert_close(remainder(p_V, p_V), p_V)


def unlikely(statistic, freedom):
    """Whether chi squared is beyond its 0.999 quantile, by Wilson and Hilferty's approximation."""
    spread = 2 / (9 * freedom)
    return statistic / freedom > (1 - spread + 3.09 * spread**0.5) ** 3


def test_the_first_token_after_verification_is_drawn_from_the_model_whatever_was_drafted():
    chances, guessed = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    logits_TV, guesses = chances.log().expand(3, 3), [guessed.log()[None]] * 2
    generator = torch.Generator().manual_seed(0)
    drafts = torch.multinomial(guessed.expand(2000, 3), 2, replacement=True, generator=generator)
    kept = [verify(logits_TV, each, guesses, Sampling(), generator) for each in drafts.tolist()]
    first = Counter(new[0] for new in kept)
    statistic = sum((first[v] - 2000 * p) ** 2 / (2000 * p) for v, p in enumerate(chances.tolist()))
    assert not unlikely(statistic, 2)
    # The second is kept or drawn where the first was kept: sum of min(p, q) = 0.4 of all.
    assert sum(len(new) > 1 for new in kept) / 2000 == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=2)], ids=["all", "top 2"])
def test_texts_of_speculation_are_as_frequent_as_their_probabilities(tiny, one_thread, sampling):
    """All texts of three tokens out of three, 400 of them, by a chi-squared test at p = 0.001."""
    from sabrage.generate.sampling import probabilities

    spec = replace(tiny.model, vocab_size=3, layers=1)
    model = build_model(spec, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    drafter, tally, number = drafter_of(spec, 2), Tally(), 400
    found = Counter(
        tuple(speculate(model, drafter, [0], max_tokens=3, sampling=sampling, seed=seed, tally=tally))
        for seed in range(number)
    )
    statistic = freedom = 0
    with torch.no_grad():
        for text in itertools.product(range(3), repeat=3):
            logits_TV = model.logits(torch.tensor([[0, *text[:2]]]))[0]
            chances_TV = probabilities(logits_TV, sampling)
            expected = number * math.prod(chances_TV[t, token].item() for t, token in enumerate(text))
            if expected == 0:
                assert found[text] == 0
            else:
                statistic += (found[text] - expected) ** 2 / expected
                freedom += 1
    assert not unlikely(statistic, freedom - 1)
    assert 0.2 < tally.acceptance < 0.95


def test_speculation_stops_at_the_end_of_text(model):
    tokens = list(generate(model, [3], max_tokens=40, sampling=GREEDY))
    end = tokens[7]
    drafter = Drafter(Oracle([3]), drafter_of(model.spec, 3).spec)
    found = list(speculate(model, drafter, [3], max_tokens=40, sampling=GREEDY, end_of_text=end))
    assert found == tokens[: tokens.index(end)]


@pytest.mark.parametrize("field", ["model", "drafter"])
def test_positions_that_there_are_not_are_refused_and_the_last_one_is_used(tiny, one_thread, field):
    spec = tiny.model
    short = override(spec, "mixers.0.rotary.max_length=12")
    model = build_model(short if field == "model" else spec, seed=1).eval()
    drafter = drafter_of(spec, 2)
    if field == "drafter":
        drafter = Drafter(drafter.module, replace(drafter.spec, mixers=short.mixers))
    prompt = [1, 2, 3, 4, 5]
    assert len(list(speculate(model, drafter, prompt, max_tokens=8, sampling=GREEDY))) == 8
    with pytest.raises(ValueError, match="max_tokens=9, allowed: 8 after a prompt of 5 tokens"):
        next(speculate(model, drafter, prompt, max_tokens=9, sampling=GREEDY))
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        next(speculate(model, drafter, [], max_tokens=1, sampling=GREEDY))


@pytest.fixture
def runs(tiny, run_recipe, tmp_path):
    """Two trained runs: `drafting`, with a sequential module, and `plain`."""
    run_recipe(weighted(tiny, sequential(1)), name="drafting")
    run_recipe(tiny, name="plain")
    return tmp_path


def test_the_command_writes_the_same_text_and_says_how_many_drafts_were_kept(runs, capsys):
    options = [
        "generate",
        str(runs / "drafting"),
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--max-tokens",
        "50",
    ]
    capsys.readouterr()
    assert main(options) == 0
    plain = capsys.readouterr()
    assert main([*options, "--speculate"]) == 0
    found = capsys.readouterr()
    assert found.out == plain.out
    said = re.search(r"(\d+) of (\d+) drafts kept \(\d+%\): (\d+) tokens after the first in (\d+)", found.err)
    kept, drafted, tokens, passes = map(int, said.groups())
    assert tokens == kept + passes
    assert passes >= drafted > 0
    assert "drafts" not in plain.err


def test_the_benchmark_compares_both_ways_of_decoding(runs, capsys):
    out = runs / "results" / "speculation.json"
    size = ["--prompts", "2", "--max-tokens", "30", "--device", "cpu"]
    assert main(["bench", "speculate", str(runs / "drafting"), "--out", str(out), *size]) == 0
    result = json.loads(out.read_text())
    greedy, sampled = result["rows"]
    assert (result["name"], greedy["temperature"], sampled["temperature"]) == ("speculation", 0, 1)
    assert greedy["same"] == 1
    for row in (greedy, sampled):
        assert row["speed_up"] == pytest.approx(row["speculated"] / row["plain"])
        # The last pass of a text drafts nothing.
        assert row["tokens_per_pass"] == pytest.approx(1 + row["acceptance"], abs=0.1)
    assert {column["key"] for column in result["columns"]} == greedy.keys()


def test_a_run_without_a_drafting_module_is_refused(runs, capsys):
    assert main(["generate", str(runs / "plain"), "--device", "cpu", "--speculate"]) == 1
    assert "objective NextToken has none; decode plainly" in capsys.readouterr().err


def test_the_drafter_has_the_trained_weights(tiny, runs):
    from sabrage.run.checkpoint import load_newest

    recipe, checkpoints = weighted(tiny, sequential(1)), runs / "drafting" / "checkpoints"
    drafter = load_drafter(recipe, checkpoints, device=torch.device("cpu"), warn=pytest.fail)
    saved = load_newest(checkpoints, warn=pytest.fail).tensors
    weights = drafter.module.state_dict()
    assert len(weights) == 5
    assert all(torch.equal(weights[name], saved[f"learner/objective.{name}"]) for name in weights)
    with pytest.raises(ConfigError, match="needs a module that drafts"):
        load_drafter(tiny, checkpoints, device=torch.device("cpu"), warn=pytest.fail)
