"""`sabrage generate`: text from a trained model."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Generate:
    """Write text with the newest checkpoint of a run, token by token.

    Try:
      sabrage generate runs/demo-20260101-120000 --prompt "The " --temperature 0.8
      sabrage generate runs/mine --prompt "Once upon a time" --top-k 50 --max-tokens 200 --seed 3
      sabrage generate runs/mtp-sequential-20260101-120000 --temperature 0 --speculate
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""

    prompt: str = ""
    """Text to go on from; empty starts a document."""

    max_tokens: int = 200
    """New tokens at most."""

    temperature: float = 0.8
    """Below 1 plays safe, above 1 dares; 0 always takes the likeliest token."""

    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 for all."""

    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this probability."""

    seed: int = 0
    """Seed of the draws: the same seed writes the same text."""

    device: str = "auto"
    """cpu, cuda, mps or auto."""

    speculate: bool = False
    """Let the run's drafting module guess ahead: the same text in fewer passes of the model (greedy), or text
    of the same distribution."""

    ranks: Path | None = None
    """File of the GPT-2 ranks, where they cannot be downloaded."""

    def run(self) -> int:
        from sabrage.cli.choose import model_of_run, named_device, tokenizer_of
        from sabrage.cli.console import say
        from sabrage.generate.sampling import Sampling
        from sabrage.generate.speculate import Tally, load_drafter, speculate
        from sabrage.generate.text import generate, stream_text
        from sabrage.run.folder import RunFolder

        sampling = Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        device = named_device(self.device)
        recipe, model = model_of_run(self.run_folder, device=device)
        write, tally = partial(generate, model), Tally()
        if self.speculate:
            checkpoints = RunFolder(self.run_folder).checkpoints
            drafter = load_drafter(recipe, checkpoints, device=device, warn=say)
            write = partial(speculate, model, drafter, tally=tally)
        tokenizer = tokenizer_of(recipe, ranks=self.ranks)
        tokens = write(
            [tokenizer.end_of_text, *tokenizer.encode(self.prompt)],
            max_tokens=self.max_tokens,
            sampling=sampling,
            end_of_text=tokenizer.end_of_text,
            seed=self.seed,
        )
        print(self.prompt, end="", flush=True)
        for piece in stream_text(tokens, tokenizer):
            print(piece, end="", flush=True)
        print()
        if self.speculate:
            print(
                f"{tally.accepted} of {tally.drafted} drafts kept ({tally.acceptance:.0%}): "
                f"{tally.passes + tally.accepted} tokens after the first in {tally.passes} passes",
                file=sys.stderr,
            )
        return 0
