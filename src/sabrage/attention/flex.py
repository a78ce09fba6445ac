"""FlexAttention (Dong et al. 2024, arXiv 2412.05496): masks and score functions compiled into one kernel.

It skips blocks of 128 x 128 pairs in which nobody sees anybody, and asks the mask only in blocks that are not
seen as a whole. Which are which is found out by block, from the first and last position and the smallest and
largest document of each, on the device and inside the compiled graph.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sabrage.attention.scores import ScoreModule
from sabrage.context import Context

BLOCK = 128
# Tiles that fit the 99 KB of shared memory of compute capability 8.6 and 8.9, where torch's own for head
# widths beyond 64 do not.
SMALL_MEMORY = 128 * 1024
SMALL_TILES = {
    "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64,
    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32,
}  # fmt: skip
# A score that looks a number up for every pair has those staged in shared memory beside keys and values: with
# torch's own tiles 242 KB of an H100's 227 (seen with torch 2.11). Small tiles, and nothing fetched ahead.
GATHERING_TILES = {**SMALL_TILES, "num_stages": 1}
# The narrowest value that the kernel multiplies.
NARROWEST = 16


def flex(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSX: Tensor,
    context: Context,
    *,
    window: int | None,
    scores: Sequence[ScoreModule],
    mask_BTS: Tensor | None,
) -> Tensor:
    """Whole sequences, (B, H, T, X): FlexAttention in the caller's graph, or compiled alone where none is."""
    functions = [score.function(k_BGSK.shape[2]) for score in scores]

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        for function in functions:
            score = function(score, head, query - key)
        return score

    if mask_BTS is None:
        length = q_BHTK.shape[2]
        mask = context.once(
            ("blocks", length, window), lambda: block_mask(length, window, context, q_BHTK.device)
        )
    else:
        mask = given_mask(mask_BTS)
    run: Callable = flex_attention
    width = v_BGSX.shape[-1]
    wide, gathers = max(q_BHTK.shape[-1], width) > 64, any(score.gathers for score in scores)
    options: dict[str, int] | None = None
    if gathers:
        options = GATHERING_TILES
    elif wide and little_memory(q_BHTK.device):
        options = SMALL_TILES
    if width < NARROWEST:
        v_BGSX = F.pad(v_BGSX, (0, NARROWEST - width))
    if q_BHTK.is_cuda and not torch.compiler.is_compiling():
        run = compiled_flex()
    out_BHTX = run(
        q_BHTK,
        k_BGSK,
        v_BGSX,
        score_mod=modified if functions else None,
        block_mask=mask,
        enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
        kernel_options=options,
    )
    return out_BHTX[..., :width]


@cache
def compiled_flex() -> Callable:
    """FlexAttention as a graph of its own; uncompiled it would hold every score in memory."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


# The compiler takes what this says for a constant of the graph; it cannot do so with the tiles themselves.
@torch.compiler.assume_constant_result
def little_memory(device: torch.device) -> bool:
    """Whether the device has too little shared memory for torch's own tiles of wide heads."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) < SMALL_MEMORY


def block_mask(length: int, window: int | None, context: Context, device: torch.device) -> BlockMask:
    """The causal mask with window and documents, by blocks."""
    documents_BT = context.documents_BT

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        if documents_BT is not None:
            seen = seen & (documents_BT[batch, query] == documents_BT[batch, key])
        return seen

    if documents_BT is None:
        blocks = listed(*seen_blocks(length, window, None, device))
    else:
        blocks = document_blocks(documents_BT, 0 if window is None else window)
    return BlockMask.from_kv_blocks(*blocks, BLOCK, sees, seq_lengths=(length, length))


# An operation of its own, which the compiler does not look into: with the lists made inside of the graph,
# evaluation on an H100 ended in illegal memory accesses (torch 2.11; rows of 2,048 and 8,192 tokens).
@torch.library.custom_op("sabrage::document_blocks", mutates_args=())
def document_blocks(documents_BT: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `listed` gives of documents, in a window of 0: all tokens."""
    some, whole = seen_blocks(documents_BT.shape[1], window or None, documents_BT, documents_BT.device)
    return listed(some, whole)


@document_blocks.register_fake
def _(documents_BT: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, count = documents_BT.shape[0], -(-documents_BT.shape[1] // BLOCK)
    counts = documents_BT.new_empty((rows, 1, count), dtype=torch.int32)
    order = documents_BT.new_empty((rows, 1, count, count), dtype=torch.int32)
    return counts, order, torch.empty_like(counts), torch.empty_like(order)


def seen_blocks(
    length: int, window: int | None, documents_BT: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(B or 1, 1, N, N) for N blocks of queries and of keys: is any pair seen, and are all.

    The first may be true where it need not; documents are numbered as one likes.
    """
    count = -(-length // BLOCK)
    first_N = torch.arange(count, device=device) * BLOCK
    last_N = first_N + (BLOCK - 1)
    nearest, farthest = first_N[:, None] - last_N, last_N[:, None] - first_N
    some, whole = farthest >= 0, nearest >= 0
    if window is not None:
        some, whole = some & (nearest < window), whole & (farthest < window)
    # A block that reaches beyond the end is never seen as a whole.
    inside_N = last_N < length
    some, whole = some[None, None], (whole & inside_N[:, None] & inside_N)[None, None]
    if documents_BT is not None:
        padding_BT = documents_BT[:, -1:].expand(-1, count * BLOCK - length)
        blocks_BNS = torch.cat((documents_BT, padding_BT), dim=1).unflatten(1, (count, BLOCK))
        low, high = blocks_BNS.amin(-1)[:, None], blocks_BNS.amax(-1)[:, None]
        some = some & (low[..., None] <= high[..., None, :]) & (low[..., None, :] <= high[..., None])
        single = low == high
        same = single[..., None] & single[..., None, :] & (low[..., None] == low[..., None, :])
        whole = whole & same
    return some, whole


def listed(some: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and lists of the blocks that are seen in part, and of those that are seen as a whole."""
    return *packed(some & ~whole), *packed(whole)


def packed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many blocks of keys each block of queries sees, their indices, those first), int32."""
    order = seen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def given_mask(mask_BTS: Tensor) -> BlockMask:
    """A mask that is given pair by pair."""
    rows, queries, keys = mask_BTS.shape

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_BTS[batch if rows > 1 else 0, query, key]

    return create_block_mask(sees, rows, None, queries, keys, device=mask_BTS.device, BLOCK_SIZE=BLOCK)
