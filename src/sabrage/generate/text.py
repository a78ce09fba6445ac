"""Cached decoding: the prompt in one pass, then one token at a time, streamed."""

import codecs
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

import torch
from torch import nn

from sabrage.config import PartType, resolve, walk
from sabrage.context import Context
from sabrage.generate.cache import DenseCache
from sabrage.generate.sampling import Sampling, draw
from sabrage.model.legality import automatic
from sabrage.model.lm import LM, build_model
from sabrage.parts import Tokenizer
from sabrage.recipe import Recipe
from sabrage.run import checkpoint
from sabrage.run.device import probe


def load_model(recipe: Recipe, checkpoints: Path, *, device: torch.device, warn: Callable[[str], None]) -> LM:
    """The model of the newest good checkpoint, fp32, ready to be used. Raises CheckpointError.

    Backends that this device lacks, since the run trained on another one, give way to what it has.
    """
    spec = suited(recipe.model, device)
    model = build_model(spec, seed=recipe.budget.seed)
    tied = {"head.weight"} if spec.head.tied else set()
    load_newest(model, "model", checkpoints, spared=tied, warn=warn)
    return model.to(device).eval()


def suited(part: PartType, device: torch.device) -> PartType:
    """The part with every "auto" decided, and every backend that the device lacks."""
    facts = probe(device)
    if any(each.refusal(facts) for _, each in walk(part)):
        part = automatic(part)
    return resolve(part, facts)


def load_newest(
    module: nn.Module,
    name: str,
    checkpoints: Path,
    *,
    spared: Set[str] = frozenset(),
    warn: Callable[[str], None],
) -> None:
    """Fills what the learner calls `name` from the newest good checkpoint; `spared` need not be in there."""
    saved = checkpoint.load_newest(checkpoints, warn=warn)
    if saved is None:
        raise checkpoint.CheckpointError(f"no checkpoint in {checkpoints}; train the run to its end first")
    prefix = f"learner/{name}."
    weights = {key.removeprefix(prefix): t for key, t in saved.tensors.items() if key.startswith(prefix)}
    missing = module.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - spared:
        raise checkpoint.CheckpointError(f"{saved.path} is of another model: {missing}")


@torch.no_grad()
def generate(
    model: LM,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    end_of_text: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields up to `max_tokens` new tokens, each as soon as it is known; stops at `end_of_text`."""
    if not prompt:
        raise ValueError("the prompt has no tokens; give at least one, such as end-of-text")
    if max_tokens < 1:
        raise ValueError(f"got max_tokens={max_tokens}, allowed: 1 or more")
    for path, limit in model.spec.max_lengths().items():
        # The last new token is never read.
        room = max(limit + 1 - len(prompt), 0)
        if max_tokens > room:
            raise ValueError(
                f"got max_tokens={max_tokens}, allowed: {room} after a prompt of {len(prompt)} tokens, since "
                f"{path}={limit}; ask for fewer, or shorten the prompt"
            )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    cache = DenseCache(model.spec, batch=1, capacity=len(prompt) + max_tokens, device=device)
    tokens_BT = torch.tensor([prompt], device=device)
    for _ in range(max_tokens):
        length = tokens_BT.shape[1]
        positions_BT = torch.arange(cache.length, cache.length + length, device=device)[None]
        h_BTD = model(tokens_BT, Context(positions_BT=positions_BT, cache=cache))
        cache.advance(length)
        token_B = draw(model.head(h_BTD[:, -1]), sampling, generator)
        token = int(token_B)
        if token == end_of_text:
            return
        yield token
        tokens_BT = token_B[:, None]


def stream_text(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as it grows; a character that spans tokens is held back until it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        piece = decoder.decode(tokenizer.decode_bytes([token]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
