"""Cached decoding: the prompt in one pass, then one token at a time, streamed."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from sabrage.config import resolve, walk
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
    saved = checkpoint.load_newest(checkpoints, warn=warn)
    if saved is None:
        raise checkpoint.CheckpointError(f"no checkpoint in {checkpoints}; train the run to its end first")
    prefix = "learner/model."
    weights = {name.removeprefix(prefix): t for name, t in saved.tensors.items() if name.startswith(prefix)}
    spec, facts = recipe.model, probe(device)
    if any(part.refusal(facts) for _, part in walk(spec)):
        spec = automatic(spec)
    spec = resolve(spec, facts)
    model = build_model(spec, seed=recipe.budget.seed)
    try:
        missing = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{saved.path} is of another model: {error}") from error
    tied = {"head.weight"} if spec.head.tied else set()
    if missing.unexpected_keys or set(missing.missing_keys) - tied:
        raise checkpoint.CheckpointError(f"{saved.path} is of another model: {missing}")
    return model.to(device).eval()


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
