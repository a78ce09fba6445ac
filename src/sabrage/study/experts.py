"""Which expert takes which kind of text: choices counted by document, and what they tell of its kind.

The information of layer l is that between the kind k of a document and the expert e of a token drawn from it,
documents weighing alike, in bits:

    I = sum_ke p(k, e) log2(p(k, e) / (p(k) p(e)))

Tokens of one document choose alike whatever its kind, so what counts as chance is found by documents: their
kinds are shuffled, and p is how often shuffled kinds give as much in any layer (Westfall and Young 1993), so
that looking at many layers finds nothing that is not there.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sabrage.feedforward.routing import Router
from sabrage.model.lm import LM
from sabrage.parts import DataError, Precision, Tokenizer

SHUFFLES = 2000
FORMS = (
    "give a folder of KIND.jsonl files (a JSON object with a text a line) or of folders KIND/ of text files"
)


@dataclass(frozen=True)
class Document:
    """A text and the kind that it is of."""

    kind: str
    text: str


def read_kinds(folder: Path, *, limit: int | None = None) -> list[Document]:
    """The documents of each kind in the folder, the first `limit` of each. Raises DataError.

    KIND.jsonl holds an object a line with its "text"; KIND/ holds a text file a document.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {FORMS}")
    found: dict[str, list[Document]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file())
            texts = [file.read_text(encoding="utf-8") for file in files[:limit]]
        elif path.suffix == ".jsonl":
            texts = list(_lines(path))[:limit]
        else:
            continue
        found.setdefault(path.stem, []).extend(Document(path.stem, text) for text in texts if text.strip())
    kinds = [kind for kind, documents in found.items() if len(documents) > 1]
    if len(kinds) < 2:
        raise DataError(
            f"{folder}: {len(kinds)} kinds with two documents or more, allowed: 2 or more; {FORMS}"
        )
    return [document for kind in kinds for document in found[kind]]


def _lines(path: Path) -> Iterator[str]:
    # Not splitlines: a text may hold a separator of its own.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: no object with a text ({error!r}); {FORMS}") from error


@torch.no_grad()
def count_choices(
    model: LM, documents: Sequence[Document], tokenizer: Tokenizer, precision: Precision, *, length: int
) -> Iterator[dict[int, np.ndarray]]:
    """For each document the tokens that each expert took, (E,), by layer.

    Of a row, the end of the text before and the document, only the first `length` tokens are read, at least
    2. A token counts for each of its experts. Raises DataError for a model without experts.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise DataError(
            "the model of this run has no experts to look at; give a run of a recipe such as moe-8"
        )
    device = next(model.parameters()).device
    taken: dict[int, np.ndarray] = {}

    def note(router: Router, module: nn.Module, given: Any, made: tuple[Tensor, Tensor, Tensor]) -> None:
        # The first token is the end of the text before.
        chosen = made[0][1:].flatten().cpu()
        taken[router.layer] = torch.bincount(chosen, minlength=len(router.bias)).numpy()

    handles = [router.register_forward_hook(partial(note, router)) for router in routers]
    model.eval()
    try:
        for document in documents:
            tokens = [tokenizer.end_of_text, *tokenizer.encode(document.text)][:length]
            taken = {}
            with precision.autocast(device):
                model(torch.tensor([tokens], device=device))
            yield taken
    finally:
        for handle in handles:
            handle.remove()


def information(shares_DE: np.ndarray, kinds_SD: np.ndarray) -> np.ndarray:
    """Bits between kind and expert, (S,), for S ways of giving D documents of `shares_DE` their kinds."""
    kinds_K = np.unique(kinds_SD)
    joint_SKE = np.stack([(kinds_SD == kind) @ shares_DE for kind in kinds_K], axis=1) / len(shares_DE)
    apart_SKE = joint_SKE.sum(2, keepdims=True) * joint_SKE.sum(1, keepdims=True)
    ratio_SKE = np.divide(joint_SKE, apart_SKE, out=np.ones_like(joint_SKE), where=joint_SKE > 0)
    return (joint_SKE * np.log2(ratio_SKE)).sum((1, 2))


def examine(
    documents: Sequence[Document],
    counts: Sequence[dict[int, np.ndarray]],
    *,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> dict[str, Any]:
    """What the report shows, as plain values: kinds, and of each layer information, chance, p and shares.

    `shares` (kinds by experts) and `load` (experts) are those of tokens, and sum to 1.
    """
    names = list(dict.fromkeys(document.kind for document in documents))
    kinds_D = np.array([names.index(document.kind) for document in documents])
    generator = np.random.default_rng(seed)
    shuffled_SD = np.stack([generator.permutation(kinds_D) for _ in range(shuffles)])
    layers, by_chance = [], []
    for layer in sorted(counts[0]):
        counts_DE = np.stack([taken[layer] for taken in counts]).astype(np.float64)
        shares_DE = counts_DE / counts_DE.sum(1, keepdims=True)
        by_kind_KE = np.stack([counts_DE[kinds_D == kind].sum(0) for kind in range(len(names))])
        by_chance.append(information(shares_DE, shuffled_SD))
        layers.append(
            {
                "layer": layer,
                "information": float(information(shares_DE, kinds_D[None])[0]),
                "chance": float(by_chance[-1].mean()),
                "load": (by_kind_KE.sum(0) / by_kind_KE.sum()).tolist(),
                "shares": (by_kind_KE / by_kind_KE.sum(1, keepdims=True)).tolist(),
            }
        )
    largest_S = np.stack(by_chance).max(0)
    for found in layers:
        # The kinds as they are count as one shuffle more; rounding is no difference.
        found["p"] = (1 + int((largest_S >= found["information"] - 1e-12).sum())) / (1 + shuffles)
    sizes_K = np.bincount(kinds_D)
    return {
        "kinds": [{"name": name, "documents": int(size)} for name, size in zip(names, sizes_K, strict=True)],
        "most": float(-(sizes_K / sizes_K.sum() * np.log2(sizes_K / sizes_K.sum())).sum()),
        "shuffles": shuffles,
        "layers": layers,
    }
