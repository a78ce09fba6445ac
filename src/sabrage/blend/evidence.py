"""What others than the network say about a token: experts, each a distribution over the vocabulary.

Counting experts look up the last k tokens, in the training text (k from 1) or in the same document so far
(k from 0, which asks for no context at all):

    p(token) = hits / count,    count = occurrences of the context, hits = those that went on with the token

and say nothing where the context was never seen. Two more make use of the network, see `neural`. What is
known of single candidates for the next token is evidence as well, see `candidates`. A context ends at the
beginning of its row and document, so that experts see what the network sees.

Shapes: B rows, T tokens in a row, N = B T, E experts, F features, D width of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sabrage.blend.blend import Blend
from sabrage.blend.candidates import DOCUMENT_ORDERS, Offered, listed, offered
from sabrage.blend.columns import Columns
from sabrage.blend.document import contexts, earlier, in_document
from sabrage.blend.grams import Grams
from sabrage.blend.neural import Rows, cached, network_says


@dataclass(frozen=True)
class Evidence(Columns):
    """Of N scored tokens: what each expert and the network say of it, and what the gate may look at.

    `log_NE` and `network_N` are log-probabilities of the token, in nats; `known_NE` says which experts say
    anything. Nothing in `known_NE` and `features_NF` depends on the scored token or on what comes after it.
    `candidates` are there where the network is rescored.
    """

    log_NE: Tensor
    known_NE: Tensor
    features_NF: Tensor
    network_N: Tensor
    candidates: Offered | None = None

    def __len__(self) -> int:
        return len(self.network_N)


@torch.no_grad()
def evidence_of(
    part: Blend,
    grams: Grams | None,
    head: Callable[[Tensor], Tensor],
    tokens_BT: Tensor,
    targets_BT: Tensor,
    documents_BT: Tensor | None,
    h_BTD: Tensor,
    *,
    vocab_size: int,
) -> Evidence:
    """The evidence on the targets of whole rows; `targets_BT` are the tokens one further on.

    `head` makes logits (M, V) of the network's states (M, D). A target of -1 is none; what is said of it
    means nothing.
    """
    depth_BT, group_BT = depths(tokens_BT, documents_BT)
    rows = Rows(tokens_BT, targets_BT.clamp(min=0), group_BT, depth_BT, h_BTD)
    text = in_text(grams, part.text_orders, rows) if grams is not None else []
    counts = [(count_N, hits_N) for count_N, hits_N, _ in text]
    features = [seen_NX for _, _, seen_NX in text]
    befores = contexts(max(part.document_orders, DOCUMENT_ORDERS), rows, vocab_size)
    for count_N, hits_N in in_document(befores[: part.document_orders], rows, vocab_size):
        counts.append((count_N, hits_N))
        features.append(tamed(count_N)[:, None])
    apart = with_gaps(grams, rows)
    features += [tamed(count_N)[:, None] for count_N in apart]
    logs = [(hits_N / count_N.clamp(min=1)).log() for count_N, hits_N in counts]
    known = [count_N > 0 for count_N, _ in counts]
    first_BT = None
    if part.seen:
        first_BT = earlier((group_BT * vocab_size + tokens_BT).flatten()).view_as(tokens_BT) == 0
    if part.cache:
        nearest = part.candidates.nearest if part.candidates else 0
        log_NC, cache_NX, followers_NK = cached(rows, part.cache, nearest)
    listed_NL, likeliest, most = None, 0, 0
    if part.candidates:
        likeliest, most = part.candidates.likeliest, part.candidates.most
        listed_NL = listed(part.candidates, grams, part.text_orders, rows)
        if part.cache:
            listed_NL = torch.cat((listed_NL, followers_NK), 1)
    says = network_says(head, rows, first_BT, listed_NL, likeliest, most)
    features.append(says.features_NX)
    if part.seen:
        logs.append(says.restricted_N)
        known.append(torch.ones_like(says.restricted_N, dtype=torch.bool))
    if part.cache:
        logs += log_NC.unbind(1)
        known += [(depth_BT > 1).flatten()] * len(part.cache)
        features.append(cache_NX)
    table = torch.stack(logs, 1), torch.stack(known, 1), torch.cat(features, 1), says.log_N
    if says.candidates is None:
        return Evidence(*table)
    counted = [count_N for count_N, _, _ in text], befores[:DOCUMENT_ORDERS]
    each = offered(rows, grams, *counted, says.candidates, vocab_size, part.cache, apart)
    return Evidence(*table, each)


def in_text(grams: Grams, orders: int, rows: Rows) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(count, hits, features) of contexts of 1 to `orders` tokens in the counted text, (N,), (N,), (N, 3)."""
    found = []
    for order in range(1, orders + 1):
        context = rows.context(order)
        count_BT, ways_BT = grams.count(context)
        hits_BT, _ = grams.count([*context, rows.targets_BT])
        deep_BT = rows.depth_BT >= order
        count_N, ways_N, hits_N = (torch.where(deep_BT, x, 0).flatten() for x in (count_BT, ways_BT, hits_BT))
        evenness_N = ways_N.clamp(min=1).log() - count_N.clamp(min=1).log()
        found.append((count_N, hits_N, torch.stack((tamed(count_N), tamed(ways_N), evenness_N), 1)))
    return found


def with_gaps(grams: Grams | None, rows: Rows) -> list[Tensor]:
    """Occurrences (N,) of each context with gaps, 0 where it begins before its document."""
    return [
        torch.where(rows.depth_BT >= abs(table.back[0]), table.count(rows.back(table.back)), 0).flatten()
        for table in (grams.gapped if grams is not None else ())
    ]


def tamed(count_N: Tensor) -> Tensor:
    """A count as a feature of about unit size."""
    return count_N.float().log1p() / 4 - 1


def depths(tokens_BT: Tensor, documents_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(tokens of the document in the row so far, a number for each document of each row), (B, T) both."""
    rows, length = tokens_BT.shape
    time_T = torch.arange(length, device=tokens_BT.device)
    first_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    if documents_BT is not None:
        first_BT[:, 1:] = documents_BT.diff(dim=1) != 0
    start_BT = torch.where(first_BT, time_T, 0).cummax(1).values
    row_B1 = torch.arange(rows, device=tokens_BT.device)[:, None]
    return time_T - start_BT + 1, row_B1 * length + start_BT
