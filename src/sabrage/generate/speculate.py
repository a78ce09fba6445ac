"""Self-speculative decoding: the objective's module drafts tokens, the model verifies them in one pass.

Leviathan et al. 2023 (arXiv 2211.17192). With p the model's distribution and q the draft's, a drafted token d
is kept with probability min(1, p(d) / q(d)); the first that is not gives way to a draw from max(p - q, 0),
renormalised, and after the last that is, one more token is drawn from p. So each token has the distribution
p, and in greedy decoding is the model's own choice: a poor draft costs time and nothing else.

Between rounds x_0 .. x_n are known and the model has read all but x_n. A round drafts tokens from the hidden
states, reads x_n and the drafts, and goes back to what it keeps. Letters: T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sabrage.config import ConfigError
from sabrage.context import Context
from sabrage.generate.cache import DenseCache
from sabrage.generate.sampling import Sampling, draw, probabilities
from sabrage.generate.text import load_newest, suited
from sabrage.model.lm import LM, ModelSpec
from sabrage.recipe import Recipe


@dataclass(frozen=True)
class Drafter:
    """A module with `draft`, as `Objective.draft_blocks` says, and its blocks as a model's layers."""

    module: Any
    spec: ModelSpec


@dataclass
class Tally:
    """How often the model ran (the prompt left out), and what became of the drafts."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were kept."""
        return self.accepted / max(self.drafted, 1)


def load_drafter(
    recipe: Recipe, checkpoints: Path, *, device: torch.device, warn: Callable[[str], None]
) -> Drafter:
    """The drafting module of the newest good checkpoint, fp32. Raises ConfigError where the run has none."""
    objective, spec = suited(recipe.objective, device), recipe.model
    blocks = objective.draft_blocks()
    if not blocks:
        raise ConfigError(
            f"speculation needs a module that drafts, and the run's objective {type(objective).__name__} has "
            "none; decode plainly, or train one that has, such as: sabrage train mtp-sequential"
        )
    if spec.embedding.streams(spec.dim):
        name = type(spec.embedding).__name__
        raise ConfigError(
            f"speculation needs an embedding of single tokens, and {name} looks back; decode plainly"
        )
    if spec.last:
        raise ConfigError("speculation knows no model.last; decode plainly, or train with model.last=null")
    module = objective.build(dim=spec.dim, vocab_size=spec.vocab_size)
    load_newest(module, "objective", checkpoints, warn=warn)
    mixers, feedforwards = zip(*blocks, strict=True)
    layers = replace(spec, layers=len(blocks), mixers=mixers, feedforwards=feedforwards)
    return Drafter(module.to(device).eval(), layers)


@torch.no_grad()
def speculate(
    model: LM,
    drafter: Drafter,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    end_of_text: int | None = None,
    seed: int = 0,
    tally: Tally | None = None,
) -> Iterator[int]:
    """Yields tokens as `generate` does, at equal temperature 0 the same ones, and adds up the `tally`.

    Where two tokens are equally likely up to rounding, passes of other lengths may choose differently.
    """
    check_room(model, drafter, len(prompt), max_tokens)
    tally = Tally() if tally is None else tally
    decoding = Decoding(model, drafter, prompt, capacity=len(prompt) + max_tokens)
    generator = torch.Generator(decoding.device).manual_seed(seed)
    new = [int(draw(decoding.read(list(prompt), num_logits=1), sampling, generator))]
    made = 0
    while True:
        for token in new:
            if token == end_of_text:
                return
            yield token
        decoding.tokens += new
        made += len(new)
        if made == max_tokens:
            return
        # Whatever is kept of the drafts, the pass gives one token more.
        count = min(drafter.spec.layers, max_tokens - made - 1)
        drafts, guesses = decoding.draft(count, sampling, generator)
        logits_TV = decoding.read([decoding.tokens[-1], *drafts], num_logits=1 + count)
        new = verify(logits_TV, drafts, guesses, sampling, generator)
        tally.passes += 1
        tally.drafted += count
        tally.accepted += len(new) - 1
        decoding.keep(len(new))


def check_room(model: LM, drafter: Drafter, num_prompt: int, max_tokens: int) -> None:
    """Raises ValueError for a prompt or a number of tokens that cannot be."""
    if num_prompt < 1 or max_tokens < 1:
        raise ValueError(f"got a prompt of {num_prompt} tokens, max_tokens={max_tokens}; allowed: 1 or more")
    limits = [limit for spec in (model.spec, drafter.spec) for limit in spec.max_lengths().values()]
    # The last new token is never read.
    room = max(min(limits, default=num_prompt + max_tokens) + 1 - num_prompt, 0)
    if max_tokens > room:
        raise ValueError(
            f"got max_tokens={max_tokens}, allowed: {room} after a prompt of {num_prompt} tokens, since "
            "model and drafting module have no more positions; ask for fewer, or shorten the prompt"
        )


class Decoding:
    """One sequence: known tokens, both caches, and the hidden states that the drafter has yet to read."""

    def __init__(self, model: LM, drafter: Drafter, prompt: Sequence[int], *, capacity: int) -> None:
        self.model, self.drafter = model, drafter
        self.device = next(model.parameters()).device
        self.tokens = list(prompt)
        self.cache, self.draft_cache = (
            DenseCache(spec, batch=1, capacity=capacity, device=self.device)
            for spec in (model.spec, drafter.spec)
        )
        # Of the positions from the length of the drafter's cache to that of the model's.
        self.h_BTD = torch.empty(1, 0, model.spec.dim, device=self.device)

    def context(self, cache: DenseCache, length: int) -> Context:
        positions_BT = torch.arange(cache.length, cache.length + length, device=self.device)[None]
        return Context(positions_BT=positions_BT, cache=cache)

    def read(self, tokens: list[int], *, num_logits: int) -> Tensor:
        """The model's logits after each of the last `num_logits` of these tokens, (T, V)."""
        tokens_BT = torch.tensor([tokens], device=self.device)
        h_BTD = self.model(tokens_BT, self.context(self.cache, len(tokens)))
        self.cache.advance(len(tokens))
        self.h_BTD = torch.cat((self.h_BTD, h_BTD), dim=1)
        return self.model.head(h_BTD[0, -num_logits:])

    def keep(self, num_read: int) -> None:
        """Forgets all but the first `num_read` tokens of the last pass."""
        known = len(self.tokens) - 1 + num_read
        self.h_BTD = self.h_BTD[:, : known - self.draft_cache.length]
        self.cache.rewind(known)

    def draft(
        self, count: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], list[Tensor]]:
        """`count` tokens that may follow, and the logits (1, V) that each was drawn from."""
        first, depth = self.draft_cache.length, self.drafter.spec.layers
        h_BTD, length = self.h_BTD, self.h_BTD.shape[1]
        drafts: list[int] = []
        guesses: list[Tensor] = []
        context = self.context(self.draft_cache, length)
        for index in range(count):
            start = first + 1 + index
            follow = [*self.tokens, *drafts][start : start + length]
            follow_BT = torch.tensor([follow], device=self.device)
            h_BTD = self.drafter.module.draft(index, h_BTD, follow_BT, self.model, context)
            guesses.append(self.model.head(h_BTD[:, -1]))
            drafts.append(int(draw(guesses[-1], sampling, generator)))
        # The deepest block has seen `depth` - 1 drafts in the place of tokens: these positions come again.
        kept = max(length - (depth - 1), 0)
        self.draft_cache.advance(kept)
        self.h_BTD = self.h_BTD[:, kept:]
        return drafts, guesses


def verify(
    logits_TV: Tensor,
    drafts: list[int],
    guesses: list[Tensor],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[int]:
    """The drafts that are kept and one token more; a row of logits is the model's for one of them."""
    for index, (drafted, guess_BV) in enumerate(zip(drafts, guesses, strict=True)):
        if sampling.temperature == 0:
            token = int(logits_TV[index].argmax())
            kept = token == drafted
        else:
            p_V, q_V = (probabilities(x_BV, sampling)[0] for x_BV in (logits_TV[index][None], guess_BV))
            uniform = torch.rand((), generator=generator, device=p_V.device)
            kept = bool(uniform < acceptance(p_V, q_V)[drafted])
            token = drafted if kept else int(torch.multinomial(remainder(p_V, q_V), 1, generator=generator))
        if not kept:
            return [*drafts[:index], token]
    return [*drafts, int(draw(logits_TV[-1:], sampling, generator))]


def acceptance(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The probability with which each drafted token is kept; 0 where it is never drafted."""
    return torch.where(q_V > 0, p_V / q_V, 0.0).clamp(max=1.0)


def remainder(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The distribution of the token that comes in place of one that is not kept."""
    more_V = (p_V - q_V).clamp(min=0)
    # Where p and q are equal up to rounding nothing is left, and p is as good.
    more_V = torch.where(more_V.sum() > 0, more_V, p_V)
    return more_V / more_V.sum()
