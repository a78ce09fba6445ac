"""Is a mixture with these counts a legal model? Asked of a made-up text, with a gate of random weights.

The properties: the probabilities of all tokens sum to one; nothing said of a token depends on it, on what
comes after it, on other rows or on earlier documents of its row.
"""

import torch
from torch import Tensor

from sabrage.blend.blend import Blend
from sabrage.blend.evidence import Evidence, rows_evidence
from sabrage.blend.gate import Gate
from sabrage.blend.grams import Grams

VOCABULARY, ROWS, LENGTH, TEXT = 48, 3, 40, 3000
END_OF_TEXT = 0


def fault(part: Blend) -> str | None:
    """What is wrong with mixtures of this part, or None; takes a fraction of a second on the CPU."""
    generator = torch.Generator().manual_seed(0)
    likely_V = torch.softmax(torch.randn(VOCABULARY, generator=generator), 0)

    def drawn(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.multinomial(likely_V, size, replacement=True, generator=generator).view(shape)

    text_N, rows_BT = drawn(TEXT), drawn(ROWS, LENGTH + 1)
    # What stands in the text is found with all of its context, what stands twice in a row as well.
    rows_BT[0, :20], rows_BT[1, 8:20] = text_N[:20], rows_BT[1, 20:32]
    rows_BT[:, LENGTH // 2] = END_OF_TEXT
    grams = Grams(text_N, VOCABULARY) if part.text_orders else None

    def said(tokens_BT: Tensor, targets_BT: Tensor) -> Evidence:
        documents_BT = (tokens_BT == END_OF_TEXT).cumsum(1, dtype=torch.int32)
        count = targets_BT.numel()
        network = torch.full((count,), 1 / VOCABULARY).log(), torch.zeros(count, 2)
        orders = part.text_orders, part.document_orders
        return rows_evidence(grams, *orders, VOCABULARY, tokens_BT, targets_BT, documents_BT, network)

    tokens_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    whole = said(tokens_BT, targets_BT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate = Gate(whole.features_NF.shape[1], whole.count_NE.shape[1], 8).requires_grad_(False)
        gate.outer.weight.normal_()
    places = [(row, place) for row in range(ROWS) for place in (0, 1, 5, LENGTH // 2, LENGTH - 1)]
    for row, place in places:
        index = row * LENGTH + place
        before_BT = tokens_BT[row : row + 1, : place + 1].expand(VOCABULARY, -1)
        each_BT = targets_BT[row : row + 1, : place + 1].repeat(VOCABULARY, 1)
        each_BT[:, -1] = torch.arange(VOCABULARY)
        asked = said(before_BT, each_BT)[torch.arange(place, VOCABULARY * (place + 1), place + 1)]
        total = float(gate(asked).exp().sum())
        if not abs(total - 1) < 1e-4:
            return f"the probabilities after {place + 1} tokens sum to {total:.6f}"
        seen = whole[slice(index, index + 1)]
        alone = asked[slice(int(targets_BT[row, place]), int(targets_BT[row, place]) + 1)]
        if not same(seen, alone):
            return f"what is said after {place + 1} tokens depends on later ones, or on other rows"
        if not all(torch.equal(x, x[:1].expand_as(x)) for x in (asked.count_NE, asked.features_NF)):
            return f"the gate's features after {place + 1} tokens depend on the token that is scored"
    middle = LENGTH // 2
    second = said(tokens_BT[:, middle:], targets_BT[:, middle:])
    kept = whole[(torch.arange(ROWS * LENGTH) % LENGTH) >= middle]
    return None if same(second, kept) else "what is said depends on earlier documents of the row"


def same(one: Evidence, other: Evidence) -> bool:
    """Whether two pieces of evidence are equal, the features up to rounding."""
    exact = torch.equal(one.count_NE, other.count_NE) and torch.equal(one.hits_NE, other.hits_NE)
    return exact and torch.allclose(one.features_NF, other.features_NF)
