"""The recipe's blend at the end of training: counts the text, fits the gate, scores the mixture."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates
from sabrage.blend.classes import classes_of
from sabrage.blend.evidence import Evidence, evidence_of
from sabrage.blend.gate import Gate, fit
from sabrage.blend.grams import Grams
from sabrage.config import ConfigError, from_json, to_json
from sabrage.data.stream import sufficiency
from sabrage.model.lm import LM
from sabrage.parts import Corpus
from sabrage.recipe import Recipe
from sabrage.run.checkpoint import CheckpointError
from sabrage.run.folder import whole
from sabrage.train.evaluate import Evaluator
from sabrage.train.world import World

FILE = "blend.safetensors"
# What it is called there beside the gate's own tensors.
CLASSES = "classes_V"


def check_room(recipe: Recipe, corpus: Corpus, world: World) -> None:
    """Raises ConfigError where a blend would be fitted on tokens that were trained on, or by many."""
    if recipe.blend is None or recipe.last_step() < recipe.plan.steps:
        return
    if world.size > 1:
        raise ConfigError("a blend is fitted by one process; start without torchrun, or use blend=null")
    trained, wanted, unseen = recipe.plan.tokens(), recipe.blend.held_out, recipe.blend.unseen_tokens
    needed = trained + wanted
    if unseen:
        needed = trained + (in_blocks(corpus, wanted) + in_blocks(corpus, unseen)) * corpus.train.block_tokens
    enough = sufficiency(corpus.train, needed + 1)
    if not enough.suffices:
        counted_only = f"blend.unseen_tokens={unseen:,} are only counted, " if unseen else ""
        raise ConfigError(
            f"plan trains on {trained:,} tokens, blend.held_out={wanted:,} more are for its gate, "
            f"{counted_only}and one pass over the data has {enough.available:,}; use fewer plan.steps"
            f"{', fewer unseen tokens' if unseen else ''} or blend=null"
        )


@dataclass
class Blended:
    """A network, what is kept of the first `blocks` blocks of its training stream, and their gate.

    `seconds` says what took how long: "counting" the text, "looking" the held-out tokens up, "fitting".
    """

    part: Blend
    evaluator: Evaluator
    shape: tuple[int | None, int | None]
    grams: Grams | None
    blocks: int
    classes_V: Tensor | None = None
    gate: Gate | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        """(loss of the mixture, loss of the network alone) on the fixed metric, nats a token."""
        assert self.gate is not None
        mixed, alone = [], []
        for evidence in self.evidence():
            mixed.append(self.gate(evidence).double().sum())
            alone.append(evidence.network_N.double().sum())
        count = self.evaluator.num_targets
        return -torch.stack(mixed).sum().item() / count, -torch.stack(alone).sum().item() / count

    def fit(self, text: np.ndarray, seed: int) -> None:
        """Fits the gate to a text, (N,), that neither network nor counts have seen."""
        with torch.no_grad(), self.timed("looking"):
            evidence = Evidence.joined(list(self.evidence(text)))
        part = self.part
        with self.timed("fitting"):
            self.gate = fit(
                evidence,
                hidden=part.hidden,
                steps=part.steps,
                batch=part.batch,
                lr=part.lr,
                seed=seed,
                rescoring_hidden=part.candidates.hidden if part.candidates else 0,
                rescoring_layers=part.candidates.layers if part.candidates else 1,
            )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes how long the `with` block takes, to the end of what it asks of the device."""
        began, device = time.perf_counter(), self.evaluator.world.device
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[name] = time.perf_counter() - began

    def evidence(self, text: np.ndarray | None = None) -> Iterator[Evidence]:
        """The evidence on every target of the metric, or of a text, in batches."""
        for tokens_BT, targets_BT, h_BTD in self.states(text):
            found = evidence_of(
                self.part,
                self.grams,
                self.head,
                tokens_BT,
                targets_BT,
                self.evaluator.documents(tokens_BT),
                h_BTD,
                vocab_size=self.evaluator.model.spec.vocab_size,
            )
            yield found[targets_BT.flatten() >= 0]

    def states(self, text: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(tokens_BT, targets_BT, h_BTD) of the metric, or of a text, in batches."""
        model = self.evaluator.model
        was_training = model.training
        model.eval()
        try:
            for tokens_BT, targets_BT in self.evaluator.batches(text):
                # The graph that validation has compiled, its loss unused: one of its own would cost more.
                _, h_BTD = self.evaluator.scored(tokens_BT, targets_BT, *self.shape)
                yield tokens_BT, targets_BT, h_BTD
        finally:
            model.train(was_training)

    def head(self, h_MD: Tensor) -> Tensor:
        """Logits of the network's states, (M, V)."""
        with self.evaluator.precision.autocast(self.evaluator.world.device):
            logits_MV: Tensor = self.evaluator.model.head(h_MD)
        return logits_MV


def counted(
    recipe: Recipe, evaluator: Evaluator, corpus: Corpus, blocks: int, classes_V: Tensor | None = None
) -> Blended:
    """The blend without a gate: of the first `blocks` blocks of the stream the newest are kept.

    The network's own classes of tokens are found where they are asked for and not given.
    """
    part = recipe.blend
    assert part is not None
    device = evaluator.world.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    made = Blended(part, evaluator, recipe.evaluation_shape(recipe.plan.steps), None, blocks)
    if part.text_orders:
        with made.timed("counting"):
            text = newest(corpus, blocks, part.text_tokens)[:-1]
            if part.unseen_tokens:
                first = blocks + in_blocks(corpus, part.held_out)
                unseen = stretch(corpus, first, in_blocks(corpus, part.unseen_tokens))[:-1]
                text = np.concatenate((text, unseen))
            text_N, vocab_size = torch.from_numpy(text).to(device), recipe.model.vocab_size
            if part.candidates and part.candidates.has_classes():
                made.classes_V = network_classes(part.candidates, evaluator.model, text_N, classes_V)
            made.grams = Grams(text_N, vocab_size, part.gaps(), made.classes_V)
    return made


def network_classes(part: Candidates, model: LM, text_N: Tensor, given_V: Tensor | None) -> Tensor:
    """(V,) the class of each token: as given, or by the network's rows at its input and in its head."""
    if given_V is not None:
        return given_V.to(text_N.device, torch.int64)
    rows = [model.embedding.weight, model.head.weight]
    counts_V = torch.bincount(text_N, minlength=len(rows[0]))
    return classes_of(rows, counts_V, part.classes, seed=0)


def newest(corpus: Corpus, blocks: int, tokens: int) -> np.ndarray:
    """(N + 1,) int32: of the first `blocks` blocks the newest `tokens` tokens, at least a block."""
    most = max(tokens // corpus.train.block_tokens, 1)
    return stretch(corpus, max(blocks - most, 0), min(blocks, most))


def blend(
    recipe: Recipe, evaluator: Evaluator, corpus: Corpus, blocks: int, *, say: Callable[[str], None]
) -> Blended | None:
    """The blend of a network that was trained on the first `blocks` blocks of the stream.

    None, with a sentence, where the device's memory does not last: the run is not lost with it.
    """
    try:
        made = counted(recipe, evaluator, corpus, blocks)
        wanted = made.part.held_out
        after = stretch(corpus, blocks, in_blocks(corpus, wanted))
        made.fit(after[: wanted + 1], recipe.budget.seed)
    except torch.cuda.OutOfMemoryError:
        say("out of memory in blending; this is the network alone (next time: --set blend.text_tokens=...)")
        return None
    return made


def in_blocks(corpus: Corpus, tokens: int) -> int:
    """The number of blocks of the training stream that hold so many tokens."""
    return -(-tokens // corpus.train.block_tokens)


def stretch(corpus: Corpus, first: int, blocks: int) -> np.ndarray:
    """(N + 1,) int32: the tokens of these blocks of the training stream and the one after them."""
    rows = corpus.train.rows(first, blocks, corpus.train.block_tokens)
    return np.append(rows[:, :-1].reshape(-1), rows[-1, -1]).astype(np.int32)


def save(folder: Path, made: Blended, *, step: int) -> None:
    """Writes gate and number of blocks, whole or not at all. Raises CheckpointError when the disk fails."""
    assert made.gate is not None
    place = folder / FILE
    tensors = {name: tensor.cpu().contiguous() for name, tensor in made.gate.state_dict().items()}
    if made.classes_V is not None:
        tensors[CLASSES] = made.classes_V.to("cpu", torch.int32)
    told = {"blocks": made.blocks, "step": step, "tensors": list(tensors)}
    if made.part.candidates:
        told["candidates"] = to_json(made.part.candidates)
    meta = {"blend": json.dumps(told)}
    try:
        with whole(place) as temporary:
            save_file(tensors, temporary, metadata=meta)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the blend could not be written to {place} ({error}); free some space"
        ) from error


def load(
    folder: Path, recipe: Recipe, evaluator: Evaluator, corpus: Corpus, *, step: int | None
) -> Blended | None:
    """The blend of a run's checkpoint after `step` steps, counted anew; None where there is none.

    Raises CheckpointError for a file that is damaged or of another recipe.
    """
    place = folder / FILE
    if recipe.blend is None or not place.exists():
        return None
    try:
        with safe_open(place, "pt") as file:
            told = json.loads(file.metadata()["blend"])
            tensors = {name: file.get_tensor(name) for name in told["tensors"]}
        if told["step"] != step:
            return None
        (hidden, features), experts = tensors["inner.weight"].shape, len(tensors["outer.bias"]) - 1
        if experts != recipe.blend.num_experts():
            raise ValueError(f"its gate has {experts} experts")
        candidates = from_json(told.get("candidates"), Candidates | None, path="candidates")
        if candidates != recipe.blend.candidates:
            raise ValueError(f"its gate was fitted with candidates={candidates}")
        rescoring = None
        if candidates:
            units, each = tensors["rescoring.each.weight"].shape
            rescoring = each, units, candidates.layers
        made = counted(recipe, evaluator, corpus, told["blocks"], tensors.pop(CLASSES, None))
        made.gate = Gate(features, experts, hidden, rescoring).requires_grad_(False)
        made.gate.load_state_dict(tensors)
        made.gate.to(evaluator.world.device)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{place}: not the blend of this recipe ({error}); remove it to score the network"
        ) from error
    return made
