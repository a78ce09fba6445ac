"""`sabrage train`: run a recipe."""

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from sabrage.parts import Corpus
    from sabrage.recipe import Recipe
    from sabrage.run.folder import RunFolder
    from sabrage.train.loop import Outcome
    from sabrage.train.workshop import Shelf


@dataclass(frozen=True)
class Train:
    """Train a recipe; everything that the run leaves behind goes into one folder.

    Ctrl-C saves a checkpoint and ends; --resume goes on with the same recipe, bit for bit on a CPU.

    Try:
      sabrage train demo
      sabrage train nocap --set data.path=data/fineweb --seed 1
      sabrage train nocap --steps 200 --set plan.tokens_per_step=65536
      sabrage train nocap --out runs/mine --resume

    Several GPUs: torchrun --nproc-per-node 2 -m sabrage train nocap
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of the recipe (`sabrage list` shows them)."""

    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change one field of the recipe: a.b=c, as often as needed; `sabrage show RECIPE` lists them."""

    seed: int | None = None
    """Seed of the initial weights (budget.seed)."""

    steps: int | None = None
    """Number of steps (plan.steps); warm-up and warm-down keep their lengths."""

    target: float | None = None
    """End at the first validation loss at or below this, in nats. For exploring, not for claims."""

    out: Path | None = None
    """Folder of the run; by default runs/RECIPE-DATE-TIME."""

    resume: bool = False
    """Go on with the run in --out, or with the newest run of this recipe in runs/."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: the best there is."""

    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Also send the log there (needs the extra `track`)."""

    def run(self, kept: "Shelf | None" = None) -> int:
        """`kept` is what a process that makes several runs keeps from one for the next."""
        from sabrage.cli.choose import named_device
        from sabrage.run.clocks import Clocks
        from sabrage.run.turn import shares_device
        from sabrage.train.loop import train
        from sabrage.train.workshop import Shelf
        from sabrage.train.world import start_world

        clocks, shelf = Clocks(inline=kept is not None or shares_device()), kept or Shelf()
        with start_world(named_device(self.device)) as world:
            recipe, folder = self.prepare(leads=world.leads)
            corpus = shelf.open(recipe.data)
            if world.leads:
                announce(recipe, corpus, folder)
            world.barrier()
            outcome = train(
                recipe,
                folder=folder,
                corpus=corpus,
                world=world,
                resume=self.resume,
                tracker=self.tracker,
                clocks=clocks,
                shelf=shelf,
            )
            if world.leads:
                conclude(recipe, corpus, folder, outcome)
        return 128 + (outcome.signal or signal.SIGINT) if outcome.ending == "interrupted" else 0

    def prepare(self, *, leads: bool) -> tuple["Recipe", "RunFolder"]:
        """The recipe with its changes, and the folder of the run."""
        from sabrage.cli.choose import newest_run, recipe_of_run
        from sabrage.config import ConfigError
        from sabrage.recipes import changed
        from sabrage.run.folder import RunFolder

        if self.resume:
            if self.set or self.seed is not None or self.steps is not None:
                raise ConfigError(
                    "--resume goes on with the run's own recipe; leave out --set, --seed, --steps"
                )
            folder = RunFolder(self.out) if self.out else newest_run(self.recipe)
            recipe = recipe_of_run(folder.create(resume=True).path)
            if recipe.name != self.recipe:
                raise ConfigError(f"{folder.path} is a run of {recipe.name!r}, not of {self.recipe!r}")
        else:
            shortcuts = {"budget.seed": self.seed, "plan.steps": self.steps}
            given = [f"{path}={value}" for path, value in shortcuts.items() if value is not None]
            recipe, folder = changed(self.recipe, [*self.set, *given]), None
        if self.target is not None:
            recipe = replace(recipe, budget=replace(recipe.budget, target=self.target))
        recipe.validate()
        # Last, so that a refused recipe leaves no folder.
        return recipe, folder or self.new_folder(recipe.name, leads=leads)

    def new_folder(self, name: str, *, leads: bool) -> "RunFolder":
        """The folder of a new run; only the leading process makes it."""
        from sabrage.run.folder import RunFolder

        if not leads:
            return RunFolder(self.out or Path("runs"))
        return RunFolder(self.out).create() if self.out else RunFolder.fresh(name)


def announce(recipe: "Recipe", corpus: "Corpus", folder: "RunFolder") -> None:
    """What is about to happen, before it does."""
    from sabrage.cli.console import say
    from sabrage.data.stream import sufficiency
    from sabrage.model.counts import num_parameters

    enough = sufficiency(corpus.train, recipe.plan.tokens(recipe.last_step()))
    say(f"[bold]{recipe.name}[/bold]: {recipe.summary}")
    steps, last = recipe.plan.steps, recipe.last_step()
    taken = f"{steps:,} steps" if last == steps else f"the first {last:,} of {steps:,} steps"
    say(f"{num_parameters(recipe.model):,} parameters; {taken}, {enough.needed:,} tokens")
    say(f"data: track {corpus.track}, {enough.available:,} training tokens, {enough.epochs:.2f} epochs")
    if not enough.suffices:
        say("[yellow]the data is used more than once: get more of it, or take fewer steps[/yellow]")
    if "unigram_entropy" in corpus.fingerprint:
        say(
            f"a model of token frequencies alone would reach {corpus.fingerprint['unigram_entropy']:.3f} nats"
        )
    say(f"run folder: {folder.path}")


def conclude(recipe: "Recipe", corpus: "Corpus", folder: "RunFolder", outcome: "Outcome") -> None:
    """How it ended, and where to look."""
    import json
    import math

    from sabrage.cli.console import say
    from sabrage.report.page import write_page

    if outcome.ending == "interrupted":
        say(
            f"stopped after step {outcome.steps:,}; go on with: sabrage train {recipe.name} --resume "
            f"--out {folder.path}"
        )
        return
    result = json.loads(folder.result.read_text())
    loss = result["validation_loss"]
    bits = f" = {loss / math.log(2):.3f} bits per byte" if corpus.track == "embedded" else ""
    say(f"[bold]validation loss {loss:.4f} nats a token{bits}[/bold] after {outcome.steps:,} steps")
    names = ("train_seconds", "nocap_seconds", "wall_seconds")
    clocks = ", ".join(f"{name} {result[name]:.1f}" for name in names if result[name] is not None)
    say(f"{clocks}; {result['tokens_per_second']:,.0f} tokens/s")
    if corpus.tokenizer is not None and recipe.name == "demo":
        show_sample(folder)
    say(f"loss curve: {write_page(folder.path)}")


def show_sample(folder: "RunFolder") -> None:
    """A little text from the model just trained, also noted in the result for the page."""
    import json

    import torch

    from sabrage.cli.choose import model_of_run, tokenizer_of
    from sabrage.cli.console import say
    from sabrage.generate.sampling import Sampling
    from sabrage.generate.text import generate, stream_text
    from sabrage.run.folder import write_json

    recipe, model = model_of_run(folder.path, device=torch.device("cpu"))
    tokenizer = tokenizer_of(recipe)
    prompt = "The "
    start = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    tokens = generate(model, start, max_tokens=300, sampling=Sampling(temperature=0.7), seed=1)
    text = prompt + "".join(stream_text(tokens, tokenizer))
    say("[bold]sample:[/bold]")
    say(text, markup=False)
    write_json(folder.result, json.loads(folder.result.read_text()) | {"sample": text})
