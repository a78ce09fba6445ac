"""`sabrage generate`: text from a trained model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Generate:
    """Write text with the newest checkpoint of a run, token by token.

    Try:
      sabrage generate runs/demo-20260101-120000 --prompt "The " --temperature 0.8
      sabrage generate runs/mine --prompt "Once upon a time" --top-k 50 --max-tokens 200 --seed 3
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

    ranks: Path | None = None
    """File of the GPT-2 ranks, where they cannot be downloaded."""

    def run(self) -> int:
        from sabrage.cli.choose import model_of_run, named_device, tokenizer_of
        from sabrage.generate.sampling import Sampling
        from sabrage.generate.text import generate, stream_text

        sampling = Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        recipe, model = model_of_run(self.run_folder, device=named_device(self.device))
        tokenizer = tokenizer_of(recipe, ranks=self.ranks)
        tokens = generate(
            model,
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
        return 0
