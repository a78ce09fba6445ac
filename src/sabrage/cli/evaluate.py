"""`sabrage eval`: how good is a trained model, on its validation split, on any text and on HellaSwag?"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import numpy as np

    from sabrage.model.lm import LM
    from sabrage.parts import Corpus
    from sabrage.recipe import Recipe
    from sabrage.train.blended import Blended
    from sabrage.train.evaluate import Evaluator


@dataclass(frozen=True)
class Eval:
    """Score the newest checkpoint of a run: on its validation split, on a text, or on a task.

    The metric of the validation split is the mean next-token cross-entropy in nats over its first targets. A
    text is scored in the same rows; its perplexity is per token, and bits per byte compare across tokenizers.
    HellaSwag's accuracy takes the ending with the highest log-probability per byte. Of a recipe with a blend
    the validation split is scored with it as well, texts and tasks by the network alone. What another blend
    would make of the same network is told by --refit, which leaves the run's own as it is.

    Try:
      sabrage eval runs/demo-20260101-120000
      sabrage eval runs/mine --data data/fineweb --length 2048 --device cuda --by-position
      sabrage eval runs/mine --length 4096 --set model.mixers.0.rotary.factor=4
      sabrage eval runs/mine --refit --set blend.candidates.layers=2
      sabrage eval runs/mine --text book.txt
      sabrage eval runs/mine --task hellaswag --file hellaswag_val.jsonl
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""

    data: Path | None = None
    """Folder of the data set, where it is not where the recipe says."""

    tokens: int | None = None
    """Targets to score; by default as many as in the run, and all of a text."""

    length: int | None = None
    """Tokens in a row, that is, the longest context; by default as in the run."""

    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change a field of the run's recipe that holds no weights: a.b=c, as often as needed."""

    refit: bool = False
    """Count the run's text and fit a blend anew, that of the recipe or what --set makes of it."""

    by_position: bool = False
    """Also tell the loss by the position in the row: what does more context bring?"""

    text: Path | None = None
    """Score this text file instead."""

    task: Literal["hellaswag"] | None = None
    """Score this task instead, from --file."""

    file: Path | None = None
    """The questions of the task, in its public format."""

    limit: int | None = None
    """Take the first questions only."""

    device: str = "auto"
    """cpu, cuda, mps or auto."""

    ranks: Path | None = None
    """File of the GPT-2 ranks, where they cannot be downloaded."""

    def run(self) -> int:
        from sabrage.cli.choose import model_of_run, named_device
        from sabrage.run.device import probe

        self.check()
        device = named_device(self.device)
        recipe, model = model_of_run(self.run_folder, device=device, sets=self.set)
        asked: dict[str, Any] = {"evaluation_tokens": self.tokens, "evaluation_length": self.length}
        budget = replace(recipe.budget, **{name: value for name, value in asked.items() if value is not None})
        recipe = replace(recipe, budget=budget).validate(probe(device))
        recipe.precision.prepare_alone(model, device)
        if self.task:
            self.score_task(recipe, model)
        elif self.text:
            self.score_text(recipe, model)
        else:
            self.score_validation(recipe, model)
        return 0

    def check(self) -> None:
        """Raises ConfigError for options that do not go together."""
        from sabrage.config import ConfigError

        if (self.task is None) != (self.file is None):
            raise ConfigError("--task and --file go together: --task hellaswag --file hellaswag_val.jsonl")
        if [self.task, self.text, self.data].count(None) < 2:
            raise ConfigError("got more than one of --data, --text and --task; score one at a time")
        if self.task and self.tokens is not None:
            raise ConfigError("--tokens is for validation and texts; a --task takes --limit questions")
        if self.task and self.by_position:
            raise ConfigError("--by-position is for validation and texts, whose tokens are all scored")
        if self.refit and (self.task or self.text):
            raise ConfigError("--refit is for a blend, and texts and tasks are scored without one")
        if self.limit is not None and (self.task is None or self.limit < 1):
            raise ConfigError(f"got --limit {self.limit}, allowed: 1 or more questions of a --task")

    def score_validation(self, recipe: "Recipe", model: "LM") -> None:
        """The fixed metric."""
        from sabrage.cli.console import say

        corpus, num_targets = recipe.data.open(self.data), recipe.budget.evaluation_tokens
        end_of_text = corpus.end_of_text if recipe.budget.evaluation_documents else None
        evaluator = self.evaluator(recipe, model, corpus.validation, num_targets, end_of_text=end_of_text)
        blended = None
        if self.refit:
            blended = self.refitted(recipe, evaluator, corpus)
        elif recipe.blend:
            blended = self.blended(recipe, evaluator, corpus)
        if blended:
            self.tell_positions(recipe, evaluator)
            loss, alone = blended.losses()
            say(f"the network alone: {alone:.5f} nats a token; with what the run counted:")
        else:
            loss = self.score(recipe, evaluator)
        say(f"validation loss {loss:.5f} nats a token over {num_targets:,} targets, track {corpus.track}")
        if corpus.tokenizer is not None:
            num_bytes = len(corpus.tokenizer.decode_bytes(corpus.validation[1 : num_targets + 1].tolist()))
            say(bits_per_byte(loss * num_targets, num_bytes))

    def score_text(self, recipe: "Recipe", model: "LM") -> None:
        """Loss, perplexity and bits per byte of a text, which is taken as one document."""
        import math

        import numpy as np

        from sabrage.cli.choose import tokenizer_of
        from sabrage.cli.console import say
        from sabrage.parts import DataError

        assert self.text is not None
        tokenizer = tokenizer_of(recipe, ranks=self.ranks)
        try:
            encoded = tokenizer.encode(self.text.read_bytes().decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{self.text}: not UTF-8 text: {error}; convert it first") from error
        encoded = encoded[: self.tokens]
        if not encoded:
            raise DataError(f"{self.text}: holds no text; give a file with some")
        tokens = np.array([tokenizer.end_of_text, *encoded])
        loss = self.score(recipe, self.evaluator(recipe, model, tokens, len(encoded)))
        say(f"loss {loss:.5f} nats a token, perplexity {math.exp(loss):.3f}, over {len(encoded):,} tokens")
        say(bits_per_byte(loss * len(encoded), len(tokenizer.decode_bytes(encoded))))

    def blended(self, recipe: "Recipe", evaluator: "Evaluator", corpus: "Corpus") -> "Blended | None":
        """The run's blend, its text counted anew; None where the newest checkpoint has none."""
        from sabrage.cli.console import say
        from sabrage.run.checkpoint import newest_step
        from sabrage.run.folder import RunFolder
        from sabrage.train.blended import load

        step = newest_step(RunFolder(self.run_folder).checkpoints)
        made = load(self.run_folder, recipe, evaluator, corpus, step=step)
        if made is None:
            say("no blend was fitted after this checkpoint: this is the network alone")
        return made

    def refitted(self, recipe: "Recipe", evaluator: "Evaluator", corpus: "Corpus") -> "Blended | None":
        """The recipe's blend, fitted to what the run has learned; None where the memory does not last."""
        from sabrage.cli.console import say
        from sabrage.config import ConfigError
        from sabrage.run.checkpoint import newest
        from sabrage.run.folder import RunFolder
        from sabrage.train.blended import blend, check_room

        if recipe.blend is None:
            raise ConfigError("this recipe has no blend to fit; say which: --set blend=Blend")
        check_room(recipe, corpus, evaluator.world)
        found = newest(RunFolder(self.run_folder).checkpoints)
        assert found is not None, "its model has been read"
        made = blend(recipe, evaluator, corpus, found[1]["block"], say=say)
        if made:
            say(", ".join(f"{name} {seconds:.1f} s" for name, seconds in made.seconds.items()))
        return made

    def evaluator(
        self,
        recipe: "Recipe",
        model: "LM",
        tokens: "np.ndarray",
        num_targets: int,
        *,
        end_of_text: int | None = None,
    ) -> "Evaluator":
        """Scores the first targets of the tokens, (N,), in the recipe's rows and precision."""
        from sabrage.train.evaluate import Evaluator
        from sabrage.train.world import World

        return Evaluator(
            model,
            recipe.precision,
            World(next(model.parameters()).device),
            tokens,
            num_targets=num_targets,
            length=recipe.budget.evaluation_length,
            batch_tokens=8192,
            compile=False,
            end_of_text=end_of_text,
        )

    def score(self, recipe: "Recipe", evaluator: "Evaluator") -> float:
        """Nats a token, of the network."""
        self.tell_positions(recipe, evaluator)
        return evaluator(recipe.evaluation_window(recipe.plan.steps))

    def tell_positions(self, recipe: "Recipe", evaluator: "Evaluator") -> None:
        """The network's loss by the position in the row, where that was asked for."""
        from sabrage.cli.console import say

        if self.by_position:
            for first, end, loss in evaluator.by_position(recipe.evaluation_window(recipe.plan.steps)):
                say(f"positions {first:,} to {end - 1:,}: {loss:.5f} nats a token")

    def score_task(self, recipe: "Recipe", model: "LM") -> None:
        """The accuracy on HellaSwag, with its standard error."""
        from rich.progress import track

        from sabrage.cli.choose import tokenizer_of
        from sabrage.cli.console import say
        from sabrage.generate.score import answer, read_hellaswag

        assert self.file is not None
        questions = read_hellaswag(self.file)[: self.limit]
        tokenizer, length = tokenizer_of(recipe, ranks=self.ranks), recipe.budget.evaluation_length
        each = answer(model, questions, tokenizer, recipe.precision, length=length)
        answers = list(track(each, "hellaswag", total=len(questions), transient=True))
        normalised, plain = (
            sum(right) / len(answers)
            for right in zip(*((one.normalised, one.plain) for one in answers), strict=True)
        )
        error = (normalised * (1 - normalised) / len(answers)) ** 0.5
        say(
            f"hellaswag acc_norm {normalised:.4f} +- {error:.4f}, acc {plain:.4f}, {len(answers):,} questions"
        )


def bits_per_byte(nats: float, num_bytes: int) -> str:
    """The sentence about a text's nats, which compares across tokenizers."""
    import math

    return f"{nats / num_bytes / math.log(2):.4f} bits per byte of text"
