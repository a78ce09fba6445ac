"""Text from a trained model: loading it, and the engine's tokens as text that grows."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import nn

from sabrage.config import PartType, resolve, walk
from sabrage.generate.engine import Engine, Request
from sabrage.generate.sampling import Sampling
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
    try:
        missing = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{saved.path} is of another model: {error}") from error
    if missing.unexpected_keys or set(missing.missing_keys) - spared:
        raise checkpoint.CheckpointError(f"{saved.path} is of another model: {missing}")


def narrow(model: LM, dtype: torch.dtype) -> LM:
    """The model with its matrices in this format; vectors and tables stay in fp32."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
    return model


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
    engine = Engine(model, rows=1, capacity=max(len(prompt) + max_tokens, 1))
    request = Request(
        prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling, seed=seed, end_of_text=end_of_text
    )
    engine.submit(request)
    for event in engine.run():
        if event.token is not None:
            yield event.token


class Writer:
    """Turns the tokens of one text into pieces of it: whole characters, and nothing from a stop string on.

    What may yet become a stop string is held back. `stopped` says that one was met; `tokens` counts.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped, self.tokens = "", False, 0

    def feed(self, token: int) -> str:
        """The text that is certain now."""
        self.tokens += 1
        return self.certain(self.decoder.decode(self.tokenizer.decode_bytes([token])), last=False)

    def finish(self) -> str:
        """What is left at the end; a character cut short is marked."""
        return self.certain(self.decoder.decode(b"", final=True), last=True)

    def certain(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + piece
        found = [text.index(stop) for stop in self.stops if stop in text]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        begun = (
            length for stop in self.stops for length in range(1, len(stop)) if text.endswith(stop[:length])
        )
        cut = len(text) - (0 if last else max(begun, default=0))
        self.held = text[cut:]
        return text[:cut]


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer, stops: Sequence[str] = ()) -> Iterator[str]:
    """Text as it grows, up to the first stop string; a character that spans tokens comes when it is whole."""
    writer = Writer(tokenizer, stops)
    for token in tokens:
        if piece := writer.feed(token):
            yield piece
        if writer.stopped:
            return
    if rest := writer.finish():
        yield rest


def stream_texts(engine: Engine, writers: Mapping[int, Writer]) -> Iterator[tuple[int, str, str | None]]:
    """(request, new text, why it ended or None) of the engine's requests until all have ended."""
    for event in engine.run():
        writer, finished = writers[event.request], event.finished
        piece = "" if event.token is None else writer.feed(event.token)
        if writer.stopped:
            engine.cancel(event.request)
            finished = "stop"
        elif finished:
            piece += writer.finish()
            finished = "stop" if writer.stopped else finished
        yield event.request, piece, finished
