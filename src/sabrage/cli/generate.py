"""`sabrage generate`: text from a trained model."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from sabrage.generate.engine import Engine
    from sabrage.generate.prompts import Prompt
    from sabrage.generate.text import Writer


@dataclass(frozen=True)
class Generate:
    """Write text with the newest checkpoint of a run, token by token, for one prompt or many at once.

    Speed, time to the first token and the memory of the cache are told on stderr.

    Try:
      sabrage generate runs/demo-20260101-120000 --prompt "The " --temperature 0.8
      sabrage generate runs/mine --prompt "Once upon a time" --top-k 50 --max-tokens 200 --seed 3
      sabrage generate runs/mtp-sequential-20260101-120000 --temperature 0 --speculate
      sabrage generate runs/mine --file prompts.jsonl --paged --json
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""

    prompt: str = ""
    """Text to go on from; empty starts a document."""

    file: Path | None = None
    """Many prompts, a JSON object a line: prompt, and what is to differ, such as seed or max_tokens."""

    max_tokens: int = 200
    """New tokens at most."""

    temperature: float = 0.8
    """Below 1 plays safe, above 1 dares; 0 always takes the likeliest token."""

    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 for all."""

    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this probability."""

    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability."""

    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there before less likely."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; as often as needed."""

    seed: int = 0
    """Seed of the draws: the same seed writes the same text."""

    rows: int = 8
    """How many prompts of a file to work on at once."""

    paged: bool = False
    """Keep the cache in pages, which take only what each text needs."""

    json: bool = False
    """Print one JSON object a text, as each ends, in place of the text."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of the matrices; auto is bf16 on CUDA for a run that was not trained in 32 bits."""

    device: str = "auto"
    """cpu, cuda, mps or auto."""

    speculate: bool = False
    """Let the run's drafting module guess ahead: the same text in fewer passes of the model (greedy), or text
    of the same distribution."""

    ranks: Path | None = None
    """File of the GPT-2 ranks, where they cannot be downloaded."""

    def run(self) -> int:
        from sabrage.cli.choose import generating_model, tokenizer_of
        from sabrage.generate.engine import Engine, Request
        from sabrage.generate.paged import PAGE_SIZE
        from sabrage.generate.text import Writer

        prompts = self.prompts()
        if self.speculate:
            return self.guess_ahead(prompts)
        recipe, model = generating_model(self.run_folder, device=self.device, dtype=self.dtype)
        tokenizer = tokenizer_of(recipe, ranks=self.ranks)
        end = tokenizer.end_of_text
        requests = [
            Request(
                prompt=(end, *tokenizer.encode(each.prompt)), max_tokens=each.max_tokens, seed=each.seed,
                sampling=each.sampling, end_of_text=end,
            )
            for each in prompts
        ]  # fmt: skip
        sizes = [len(request.prompt) + request.max_tokens for request in requests]
        rows = min(self.rows, len(prompts))
        # Enough for the largest that can run at once.
        pages = sum(-(-size // PAGE_SIZE) for size in sorted(sizes)[-rows:])
        engine = Engine(
            model, rows=rows, capacity=max(sizes), num_pages=pages if self.paged else None,
            window=recipe.plan.at(recipe.plan.steps - 1).window,
        )  # fmt: skip
        texts = [Text(each.prompt, Writer(tokenizer, each.stop)) for each in prompts]
        for request in requests:
            engine.submit(request)
        show = print_objects if self.json else print_texts
        show(follow(engine, dict(enumerate(texts))), texts, engine)
        print(summary(texts, engine), file=sys.stderr)
        return 0

    def guess_ahead(self, prompts: "list[Prompt]") -> int:
        """Writes one text with the run's drafting module. Raises ConfigError for what it cannot do."""
        from sabrage.cli.choose import generating_model, named_device, tokenizer_of
        from sabrage.cli.console import say
        from sabrage.config import ConfigError
        from sabrage.generate.speculate import Tally, load_drafter, speculate
        from sabrage.generate.text import stream_text
        from sabrage.run.folder import RunFolder

        plain = not (self.paged or self.json or self.stop) and self.repetition_penalty == 1
        if self.file is not None or not plain:
            raise ConfigError(
                "--speculate writes one text from plain probabilities; leave out --file, --paged, --json, "
                "--stop and --repetition-penalty, or --speculate"
            )
        # Drafter and model compare their probabilities, so both stay in fp32.
        recipe, model = generating_model(self.run_folder, device=self.device, dtype="fp32")
        checkpoints, tally = RunFolder(self.run_folder).checkpoints, Tally()
        drafter = load_drafter(recipe, checkpoints, device=named_device(self.device), warn=say)
        tokenizer, prompt = tokenizer_of(recipe, ranks=self.ranks), prompts[0]
        tokens = speculate(
            model,
            drafter,
            [tokenizer.end_of_text, *tokenizer.encode(prompt.prompt)],
            max_tokens=prompt.max_tokens,
            sampling=prompt.sampling,
            end_of_text=tokenizer.end_of_text,
            seed=prompt.seed,
            tally=tally,
        )
        print(prompt.prompt, end="", flush=True)
        for piece in stream_text(tokens, tokenizer):
            print(piece, end="", flush=True)
        print()
        print(
            f"{tally.accepted} of {tally.drafted} drafts kept ({tally.acceptance:.0%}): "
            f"{tally.passes + tally.accepted} tokens after the first in {tally.passes} passes",
            file=sys.stderr,
        )
        return 0

    def prompts(self) -> list["Prompt"]:
        """What is to be written. Raises ValueError."""
        from sabrage.config import ConfigError
        from sabrage.generate.prompts import Prompt, read_prompts
        from sabrage.generate.sampling import Sampling

        if self.file is not None and self.prompt:
            raise ConfigError("got --prompt and --file; give one of them")
        if self.rows < 1:
            raise ConfigError(f"got --rows {self.rows}, allowed: 1 or more")
        sampling = Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )  # fmt: skip
        default = Prompt(
            prompt=self.prompt, max_tokens=self.max_tokens, seed=self.seed, stop=self.stop, sampling=sampling
        )
        return [default] if self.file is None else read_prompts(self.file, default)


@dataclass
class Text:
    """One text as it is written, and when: seconds on the clock of `time.perf_counter`."""

    prompt: str
    writer: "Writer"
    text: str = ""
    finished: str | None = None
    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0


def follow(engine: "Engine", texts: Mapping[int, Text]) -> Iterator[tuple[int, str]]:
    """(number, new text) of the engine's requests as they go on, noted in `texts` as well."""
    from sabrage.generate.text import stream_texts

    for number, piece, finished in stream_texts(engine, {n: text.writer for n, text in texts.items()}):
        text = texts[number]
        text.last = time.perf_counter()
        text.first = text.first or text.last
        text.text += piece
        text.finished = finished
        yield number, piece


def print_texts(pieces: Iterator[tuple[int, str]], texts: list[Text], engine: "Engine") -> None:
    """The texts in order with an empty line between two, each as it grows once those before it are done."""
    current = 0
    print(texts[0].prompt, end="", flush=True)
    for number, piece in pieces:
        if number == current:
            print(piece, end="", flush=True)
        while current < len(texts) and texts[current].finished:
            print()
            current += 1
            if current < len(texts):
                print(f"\n{texts[current].prompt}{texts[current].text}", end="", flush=True)


def print_objects(pieces: Iterator[tuple[int, str]], texts: list[Text], engine: "Engine") -> None:
    """An object a line for every text that ends."""
    for number, _ in pieces:
        text = texts[number]
        if text.finished:
            told = {
                "index": number,
                "prompt": text.prompt,
                "text": text.text,
                "finished": text.finished,
                "tokens": text.writer.tokens,
                "first_token_seconds": round(text.first - text.begun, 6),
                "seconds": round(text.last - text.begun, 6),
                "cache_bytes": engine.cache.bytes(),
            }
            print(json.dumps(told), flush=True)


def summary(texts: Iterable[Text], engine: "Engine") -> str:
    """Speed, time to the first token (in the mean) and memory, as a line."""
    from statistics import fmean

    from sabrage.run.units import size

    texts = list(texts)
    tokens = sum(text.writer.tokens for text in texts)
    seconds = max(text.last for text in texts) - min(text.begun for text in texts)
    first = fmean(text.first - text.begun for text in texts)
    return (
        f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s; first token after "
        f"{first:.3f} s; cache {size(engine.cache.bytes())}"
    )
