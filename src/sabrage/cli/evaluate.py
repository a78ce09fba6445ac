"""`sabrage eval`: the validation loss of a trained model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Eval:
    """Score the newest checkpoint of a run on its validation split.

    The metric is the mean next-token cross-entropy in nats over the first targets of the split.

    Try:
      sabrage eval runs/demo-20260101-120000
      sabrage eval runs/mine --data data/fineweb --length 2048 --device cuda
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""

    data: Path | None = None
    """Folder of the data set, where it is not where the recipe says."""

    tokens: int | None = None
    """Targets to score; by default as many as in the run."""

    length: int | None = None
    """Tokens in a row, that is, the longest context; by default as in the run."""

    device: str = "auto"
    """cpu, cuda, mps or auto."""

    def run(self) -> int:
        import math

        from torch.nn import ModuleDict

        from sabrage.cli.choose import model_of_run, named_device
        from sabrage.cli.console import say
        from sabrage.run.device import probe
        from sabrage.train.evaluate import Evaluator
        from sabrage.train.world import World

        device = named_device(self.device)
        recipe, model = model_of_run(self.run_folder, device=device)
        asked = {"evaluation_tokens": self.tokens, "evaluation_length": self.length}
        budget = replace(recipe.budget, **{name: value for name, value in asked.items() if value is not None})
        recipe = replace(recipe, budget=budget).validate(probe(device))
        # By the names that the patterns of a precision are meant for.
        recipe.precision.prepare(ModuleDict({"model": model}), device)
        corpus = recipe.data.open(self.data)
        num_targets = budget.evaluation_tokens
        evaluator = Evaluator(
            model,
            recipe.precision,
            World(device),
            corpus.validation,
            num_targets=num_targets,
            length=budget.evaluation_length,
            batch_tokens=8192,
            compile=False,
        )
        loss = evaluator()
        say(f"validation loss {loss:.5f} nats a token over {num_targets:,} targets, track {corpus.track}")
        if corpus.tokenizer is not None:
            num_bytes = len(corpus.tokenizer.decode_bytes(corpus.validation[1 : num_targets + 1].tolist()))
            say(f"{loss * num_targets / num_bytes / math.log(2):.4f} bits per byte of text")
        return 0
