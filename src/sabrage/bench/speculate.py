"""What self-speculative decoding brings on this device: plain and speculated text from the same prompts.

Prompts are stretches of the validation split. A row is a temperature: drafts kept, tokens a pass of the
model, tokens per second of both, one text to warm up left out, and the share of prompts whose two texts are
the same: in greedy decoding all, but for tokens that are equally likely up to rounding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sabrage.bench.result import Column, write_result
from sabrage.generate.sampling import Sampling
from sabrage.generate.speculate import Drafter, Tally, speculate
from sabrage.generate.text import generate
from sabrage.model.lm import LM
from sabrage.parts import Corpus
from sabrage.recipe import Recipe
from sabrage.run.device import probe

COLUMNS: list[Column] = [
    {"key": "temperature", "title": "temperature", "format": ".1f"},
    {"key": "acceptance", "title": "drafts kept", "format": ".1%"},
    {"key": "tokens_per_pass", "title": "tokens a pass", "format": ".2f"},
    {"key": "plain", "title": "plain tokens/s", "format": ",.1f"},
    {"key": "speculated", "title": "speculated tokens/s", "format": ",.1f"},
    {"key": "speed_up", "title": "speed-up", "format": ".2f"},
    {"key": "same", "title": "same text", "format": ".0%"},
]


def prompts_of(corpus: Corpus, *, number: int, length: int) -> list[list[int]]:
    """`number` stretches of `length` tokens, spread over the validation split."""
    starts = range(0, len(corpus.validation) - length, max(len(corpus.validation) // number, 1))
    return [corpus.validation[start : start + length].tolist() for start in starts][:number]


def timed(
    write: Callable[..., Iterator[int]], prompts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], float]:
    """The texts and the tokens per second; `write(prompt, seed=...)` yields tokens."""
    list(write(prompts[0], seed=0))
    began = time.perf_counter()
    # Every token is read on the CPU, so the device is done when the loop is.
    texts = [list(write(prompt, seed=seed)) for seed, prompt in enumerate(prompts)]
    return texts, sum(map(len, texts)) / (time.perf_counter() - began)


def compare(
    model: LM, drafter: Drafter, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float
) -> dict[str, Any]:
    """One row of the table."""
    sampling, tally = Sampling(temperature=temperature), Tally()

    def plainly(prompt: Sequence[int], *, seed: int) -> Iterator[int]:
        return generate(model, prompt, max_tokens=max_tokens, sampling=sampling, seed=seed)

    def speculating(prompt: Sequence[int], *, seed: int) -> Iterator[int]:
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "seed": seed}
        return speculate(model, drafter, prompt, tally=tally, **options)

    (plain, speed), (speculated, faster) = timed(plainly, prompts), timed(speculating, prompts)
    return {
        "temperature": temperature,
        "acceptance": tally.acceptance,
        "tokens_per_pass": (tally.passes + tally.accepted) / tally.passes,
        "plain": speed,
        "speculated": faster,
        "speed_up": faster / speed,
        "same": sum(own == other for own, other in zip(plain, speculated, strict=True)) / len(prompts),
    }


def measure(
    recipe: Recipe,
    model: LM,
    drafter: Drafter,
    corpus: Corpus,
    *,
    out: Path,
    number: int = 8,
    length: int = 64,
    max_tokens: int = 128,
) -> list[dict[str, Any]]:
    """Compares at temperatures 0 and 1, prints the rows and writes the result file."""
    prompts, device = prompts_of(corpus, number=number, length=length), next(model.parameters()).device
    rows = []
    for temperature in (0.0, 1.0):
        rows.append(compare(model, drafter, prompts, max_tokens=max_tokens, temperature=temperature))
        print(" ".join(f"{key}={value:.4g}" for key, value in rows[-1].items()), flush=True)
    write_result(
        out,
        name=out.stem,
        device=probe(device).name,
        columns=COLUMNS,
        rows=rows,
        track=corpus.track,
        recipe=recipe.name,
        seeds=[recipe.budget.seed],
    )
    return rows
