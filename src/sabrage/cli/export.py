"""`sabrage export`: a trained model for other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Export:
    """Write the newest checkpoint of a run as a folder that `transformers` loads with trust_remote_code.

    The folder holds weights (safetensors), config, tokenizer and a small modelling file; whoever loads it
    needs sabrage installed as well. Texts began with <|endoftext|> in training: put it before a prompt.

    Try:
      sabrage export runs/demo-20260101-120000 --to hf exported/demo
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder to write, new or empty."""

    to: Literal["hf"] = "hf"
    """The format: that of Hugging Face's libraries."""

    ranks: Path | None = None
    """File of the GPT-2 ranks, where they cannot be downloaded."""

    def run(self) -> int:
        import torch

        from sabrage.cli.choose import model_of_run, tokenizer_of
        from sabrage.cli.console import say
        from sabrage.config import ConfigError
        from sabrage.export.huggingface import export

        recipe, model = model_of_run(self.run_folder, device=torch.device("cpu"))
        try:
            tokenizer = tokenizer_of(recipe, ranks=self.ranks)
        except ConfigError as error:
            say(f"without a tokenizer: {error}", markup=False)
            tokenizer = None
        for path in export(recipe, model, self.out, tokenizer=tokenizer):
            say(f"{path.stat().st_size:>13,} bytes  {path}", markup=False)
        return 0
