"""`sabrage chat`: a text written in turns."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from sabrage.generate.engine import Engine
    from sabrage.parts import Tokenizer


@dataclass(frozen=True)
class Chat:
    """Write a text in turns with the newest checkpoint of a run: you a line, the model what follows it.

    A model that was trained on plain text continues it and answers nobody: the whole conversation is one
    text to it, your lines included. What was written stays in the cache, so that no turn is read twice.
    Ctrl-C stops the model, Ctrl-D ends.

    Try:
      sabrage chat runs/demo-20260101-120000
      sabrage chat runs/mine --max-tokens 60 --temperature 0.7 --stop "."
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""

    max_tokens: int = 100
    """New tokens a turn at most."""

    capacity: int | None = None
    """Tokens of the whole text at most, then a new one begins; by default the longest trained on."""

    temperature: float = 0.8
    """Below 1 plays safe, above 1 dares; 0 always takes the likeliest token."""

    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 for all."""

    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this probability."""

    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability."""

    repetition_penalty: float = 1.0
    """Above 1 makes tokens of this turn less likely to come again."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End a turn before this text; as often as needed."""

    seed: int = 0
    """Seed of the draws: the same seed and lines write the same text."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of the matrices; auto is bf16 on CUDA for a run that was not trained in 32 bits."""

    device: str = "auto"
    """cpu, cuda, mps or auto."""

    ranks: Path | None = None
    """File of the GPT-2 ranks, where they cannot be downloaded."""

    def run(self) -> int:
        from sabrage.cli.choose import generating_model, tokenizer_of
        from sabrage.generate.engine import Engine
        from sabrage.generate.paged import PAGE_SIZE

        recipe, model = generating_model(self.run_folder, device=self.device, dtype=self.dtype)
        longest = max(knobs.sequence_length for knobs in recipe.plan.stages())
        capacity = min([self.capacity or longest, *model.spec.max_lengths().values()])
        # One more, since a turn begins with a copy of the page on which the last one ended.
        pages = -(-capacity // PAGE_SIZE) + 1
        window = recipe.plan.at(recipe.plan.steps - 1).window
        engine = Engine(model, rows=1, capacity=capacity, num_pages=pages, window=window)
        conversation = Conversation(self, engine, tokenizer_of(recipe, ranks=self.ranks))
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                continue
            conversation.turn(line)


class Conversation:
    """One growing text; `last` is the request that wrote its end."""

    def __init__(self, options: Chat, engine: "Engine", tokenizer: "Tokenizer") -> None:
        from sabrage.generate.sampling import Sampling

        self.options, self.engine, self.tokenizer = options, engine, tokenizer
        self.sampling = Sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
        )  # fmt: skip
        self.last: int | None = None
        self.turns = 0

    def turn(self, line: str) -> None:
        """Adds the line to the text and prints what follows."""
        from sabrage.cli.generate import Text, follow, summary
        from sabrage.generate.text import Writer
        from sabrage.train.interrupt import Interruption

        number = self.submit(line)
        if number is None:
            return
        text = Text(line, Writer(self.tokenizer, self.options.stop))
        with Interruption() as interruption:
            for _, piece in follow(self.engine, {number: text}):
                print(piece, end="", flush=True)
                if interruption.signal is not None:
                    self.engine.cancel(number)
        if self.last is not None:
            self.engine.forget(self.last)
        self.last = number
        if interruption.signal == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        used = f"; {self.engine.kept_length(number):,} of {self.engine.capacity:,} tokens used"
        print()
        print(f"[{summary([text], self.engine)}{used}]", file=sys.stderr)

    def submit(self, line: str) -> int | None:
        """The request of a turn; where the text is full a new one begins."""
        from sabrage.generate.engine import Request

        end = self.tokenizer.end_of_text
        for after in dict.fromkeys((self.last, None)):
            begun = () if after is not None else (end,)
            # A line follows on a new line, unless a text has just ended.
            gap = "\n" if after is not None and self.engine.kept[after][1] != end else ""
            prompt = (*begun, *self.tokenizer.encode(gap + line))
            room = self.engine.capacity - self.engine.kept_length(after) - len(prompt)
            if room >= 1:
                self.turns += 1
                return self.engine.submit(
                    Request(
                        prompt=prompt, max_tokens=min(self.options.max_tokens, room), sampling=self.sampling,
                        seed=self.options.seed + self.turns - 1, end_of_text=end, keep=True, after=after,
                    )
                )  # fmt: skip
            if after is not None:
                limit = self.engine.capacity
                print(f"[the text is full at {limit:,} tokens; a new one begins]", file=sys.stderr)
                self.engine.forget(after)
                self.last = None
        print(f"[a line of {len(prompt):,} tokens is longer than the text may become]", file=sys.stderr)
        return None
