"""Is a mixture with these counts a legal model? Asked of a made-up text, with a gate of random weights.

The properties: the probabilities of all tokens sum to one; nothing said of a token depends on it, on what
comes after it, on other rows or on earlier documents of its row.
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Offered
from sabrage.blend.evidence import Evidence, evidence_of
from sabrage.blend.gate import Gate
from sabrage.blend.grams import Grams
from sabrage.run.device import one_thread

VOCABULARY, ROWS, LENGTH, TEXT = 48, 3, 40, 3000
END_OF_TEXT = 0


@one_thread()
def fault(part: Blend) -> str | None:
    """What is wrong with mixtures of this part, or None; takes a fraction of a second on the CPU."""
    rows_BT, said = stage(part)
    tokens_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    whole = said(tokens_BT, targets_BT)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        gate = Gate.of(whole, hidden=8, rescoring_hidden=8).requires_grad_(False)
        gate.outer.weight.normal_()
        if gate.rescoring is not None:
            # Little enough that no rounding of what is left for other tokens is raised to anything.
            gate.rescoring.outer.weight.normal_(std=0.3)
    for row, place in ((row, place) for row in range(ROWS) for place in (0, 1, 5, LENGTH // 2, LENGTH - 1)):
        before_BT = tokens_BT[row : row + 1, : place + 1].expand(VOCABULARY, -1)
        each_BT = targets_BT[row : row + 1, : place + 1].repeat(VOCABULARY, 1)
        each_BT[:, -1] = torch.arange(VOCABULARY)
        asked = said(before_BT, each_BT)[torch.arange(place, VOCABULARY * (place + 1), place + 1)]
        total = float(gate(asked).exp().sum())
        if not abs(total - 1) < 1e-4:
            return f"the probabilities after {place + 1} tokens sum to {total:.6f}"
        index, target = row * LENGTH + place, int(targets_BT[row, place])
        if not same(whole[slice(index, index + 1)], asked[slice(target, target + 1)]):
            return f"what is said after {place + 1} tokens depends on later ones, or on other rows"
        if not all(torch.equal(x, x[:1].expand_as(x)) for x in (asked.known_NE, asked.features_NF)):
            return f"the gate's features after {place + 1} tokens depend on the token that is scored"
        each = asked.candidates
        if each is not None and not all(
            torch.equal(x, x[:1].expand_as(x)) for x in (each.log_NC, each.features_NCX)
        ):
            return f"the candidates after {place + 1} tokens depend on the token that is scored"
    middle = LENGTH // 2
    second = said(tokens_BT[:, middle:], targets_BT[:, middle:])
    kept = whole[(torch.arange(ROWS * LENGTH) % LENGTH) >= middle]
    return None if same(second, kept) else "what is said depends on earlier documents of the row"


def stage(part: Blend) -> tuple[Tensor, Callable[[Tensor, Tensor], Evidence]]:
    """Made-up rows, (B, T + 1), and what is said of the targets in (tokens_BT, targets_BT)."""
    generator = torch.Generator().manual_seed(0)
    likely_V = torch.softmax(torch.randn(VOCABULARY, generator=generator), 0)

    def drawn(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.multinomial(likely_V, size, replacement=True, generator=generator).view(shape)

    text_N, rows_BT = drawn(TEXT), drawn(ROWS, LENGTH + 1)
    # What stands in the text is found with all of its context, what stands twice in a row as well.
    rows_BT[0, :20], rows_BT[1, 8:20] = text_N[:20], rows_BT[1, 20:32]
    rows_BT[:, LENGTH // 2] = END_OF_TEXT
    classes_V = torch.arange(VOCABULARY) % min(part.candidates.classes, 7) if part.candidates else None
    grams = Grams(text_N, VOCABULARY, part.gaps(), classes_V) if part.text_orders else None
    # A network of sorts: a state depends on two tokens, logits on the state.
    table_VD = torch.randn(VOCABULARY, 8, generator=generator)
    head_DV = torch.randn(8, VOCABULARY, generator=generator)

    def states(tokens_BT: Tensor) -> Tensor:
        h_BTD = table_VD[tokens_BT]
        h_BTD[:, 1:] += 0.5 * table_VD[tokens_BT[:, :-1]] * (tokens_BT[:, 1:, None] != END_OF_TEXT)
        return h_BTD

    def said(tokens_BT: Tensor, targets_BT: Tensor) -> Evidence:
        documents_BT = (tokens_BT == END_OF_TEXT).cumsum(1, dtype=torch.int32)
        rows = tokens_BT, targets_BT, documents_BT, states(tokens_BT)
        return evidence_of(part, grams, lambda h_MD: h_MD @ head_DV, *rows, vocab_size=VOCABULARY)

    return rows_BT, said


def same(one: Evidence, other: Evidence) -> bool:
    """Whether two pieces of evidence are equal up to rounding."""
    if not torch.equal(one.known_NE, other.known_NE):
        return False
    pairs = [
        (torch.where(one.known_NE, one.log_NE, 0.0), torch.where(other.known_NE, other.log_NE, 0.0)),
        (one.features_NF, other.features_NF),
        (one.network_N, other.network_N),
    ]
    if one.candidates and other.candidates:
        names = (field.name for field in fields(Offered))
        pairs += [(getattr(one.candidates, name), getattr(other.candidates, name)) for name in names]
    return all(torch.allclose(left, right, atol=1e-4) for left, right in pairs)
