"""What is drawn from, and how each row of a batch draws on its own."""

import re

import pytest
import torch

from sabrage.generate.prompts import Prompt, read_prompts
from sabrage.generate.sampling import Sampler, Sampling, distribution, pick, probabilities
from sabrage.parts import DataError

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
CPU = torch.device("cpu")


def sampler_of(*samplings, seed=0):
    """A sampler over the five tokens with a row for each."""
    sampler = Sampler(rows=len(samplings), vocab_size=5, device=CPU)
    for row, sampling in enumerate(samplings):
        sampler.place(row, sampling, seed)
    return sampler


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    chances = LOGITS.softmax(-1)[0]
    for kept in (1, 2, 3, 4, 5):
        share = (chances[kept - 1] / chances[0]).item() * 0.999
        found = probabilities(LOGITS, Sampling(min_p=share))[0]
        assert (found > 0).sum() == kept
        torch.testing.assert_close(found[:kept], chances[:kept] / chances[:kept].sum())


def test_cuts_are_made_one_after_another():
    # Of four tokens 0.64, 0.24, 0.09, 0.03: the first two reach 0.85, the second is above 0.3 of the first.
    found = probabilities(LOGITS, Sampling(top_k=4, top_p=0.85, min_p=0.3))[0]
    torch.testing.assert_close(found[:2], LOGITS[0, :2].softmax(-1))
    assert found[2:].tolist() == [0, 0, 0]
    assert (probabilities(LOGITS, Sampling(top_k=4, top_p=0.85, min_p=0.4)) > 0).sum() == 1


def test_sorting_changes_no_bit_for_rows_that_leave_no_token_out():
    logits_BV = torch.randn(4, 997, generator=torch.Generator().manual_seed(0))
    settings_B5 = torch.tensor([[0.7, 0, 1, 0, 1]]).expand(4, -1)
    assert torch.equal(*(distribution(logits_BV, settings_B5, cut=cut) for cut in (True, False)))


def test_every_row_is_cut_by_its_own_settings():
    samplings = [Sampling(top_k=2), Sampling(temperature=0.5), Sampling(top_p=0.5), Sampling(min_p=0.9)]
    settings_B5 = sampler_of(*samplings).settings_B5
    together = distribution(LOGITS.expand(4, -1), settings_B5, cut=True)
    torch.testing.assert_close(together, torch.cat([probabilities(LOGITS, each) for each in samplings]))


def test_a_number_falls_on_the_token_whose_share_of_the_line_it_lies_in():
    chances_BV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(5, -1)
    uniform_B = torch.tensor([0.0, 0.2499, 0.25, 0.5, 1 - 2**-24])
    assert pick(chances_BV, uniform_B).tolist() == [1, 1, 3, 3, 3]


def test_tokens_that_were_seen_are_punished_whatever_the_sign_of_their_logit():
    sampler = sampler_of(*[Sampling(temperature=0, repetition_penalty=2.5)] * 3)
    sampler.see(torch.tensor([[0, 0], [0, 1], [4, 4]]))
    sampler.advance(range(3))
    logits = torch.tensor([[2.0, 1.0, -1.0, -1.1, -9.0]]).expand(3, -1)
    assert sampler(logits, cut=False).tolist() == [1, 0, 0]
    negative = torch.tensor([[-1.0, -2.0, -9.0, -9.0, -9.0]]).expand(3, -1)
    assert sampler(negative, cut=False).tolist() == [1, 0, 0]


def test_a_row_that_is_placed_anew_has_seen_nothing():
    sampler = sampler_of(Sampling(temperature=0, repetition_penalty=9.0))
    sampler.see(torch.tensor([[0]]))
    sampler.place(0, Sampling(temperature=0, repetition_penalty=9.0), 0)
    assert sampler(LOGITS, cut=False).tolist() == [0]


def test_a_rows_numbers_are_its_seeds_alone():
    def numbers(seeds, others):
        sampler = Sampler(rows=3, vocab_size=5, device=CPU)
        for row, seed in enumerate(seeds):
            sampler.place(row, Sampling(), seed)
        found = []
        for step in range(6):
            sampler.advance([1, *others[: step % 3]])
            found.append(sampler.uniform_B[1].item())
        return found

    assert numbers([7, 8, 9], [0, 2]) == numbers([1, 8, 2], [])
    assert numbers([7, 8, 9], []) != numbers([7, 9, 9], [])
    assert numbers([0, -1, 0], []) != numbers([0, 1, 0], [])


def test_draws_of_rows_follow_their_distributions():
    samplings = [Sampling(), Sampling(top_k=2), Sampling(temperature=0.5)]
    sampler, count, drawn = sampler_of(*samplings, seed=4), 2000, []
    for _ in range(count):
        sampler.advance(range(3))
        drawn.append(sampler(LOGITS.expand(3, -1), cut=True))
    for row, sampling in enumerate(samplings):
        shares = torch.bincount(torch.stack(drawn)[:, row], minlength=5) / count
        torch.testing.assert_close(shares, probabilities(LOGITS, sampling)[0], rtol=0, atol=0.04)


DEFAULT = Prompt(prompt="", max_tokens=9, seed=3, stop=("x",), sampling=Sampling(top_k=5))


def test_a_line_of_a_file_says_what_it_wants_otherwise(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"prompt": "b", "top_p": 0.5, "stop": ["y", "z"]}\n{"prompt": "c", "seed": 1}\n'
    )
    found = read_prompts(path, DEFAULT)
    assert [(each.prompt, each.seed, each.stop, each.max_tokens) for each in found] == [
        ("a", 3, ("x",), 9), ("b", 4, ("y", "z"), 9), ("c", 1, ("x",), 9),
    ]  # fmt: skip
    assert found[1].sampling == Sampling(top_k=5, top_p=0.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: .*Expecting"),
        ('"text"', r':2: not an object with a prompt; write \{"prompt": "The "\}'),
        ('{"prompt": "a", "topk": 3}', ":2: unknown field 'topk'; allowed: .*top_k"),
        ('{"prompt": "a", "top_p": 7}', ":2: .*allowed: 0 < top_p <= 1"),
        ('{"prompt": "a", "seed": "x"}', ":2: seed='x' is of the wrong kind"),
        ('{"prompt": "a", "max_tokens": true}', ":2: max_tokens=True is of the wrong kind"),
        ('{"prompt": "a", "stop": [1]}', ":2: stop must be a list of texts"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=re.escape(str(path)) + message):
        read_prompts(path, DEFAULT)


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl", DEFAULT)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl", DEFAULT)
