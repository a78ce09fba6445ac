"""Rows whose documents are kept apart, as they come in the stream or packed so that few of them are cut.

A document is a stretch of the stream that begins with an end of text. Packing rearranges the tokens within a
block and nothing else: a block's rows hold exactly the block's tokens, each once, each with the target that
it has in the stream, whatever the length of the rows. So one integer still names every place of a run, a
change of the sequence length repeats nothing, and as many tokens can be used as without packing. A document
is cut where a block ends, so that larger blocks cut fewer.

What a block holds of a document is a piece. A piece longer than a row is cut into whole rows and a rest. The
longest first, each goes into the row with the least room that takes it ("best fit", Ding et al. 2024, arXiv
2404.10830, without their padding). Those that fit nowhere come last: each fills up the row with the most
room, and its rest is placed in turn.

The last token of a document has the next end of text as its target, and the last token of a piece that was
cut the token after the cut: both come next in the text, and both are scored.
"""

import bisect
import heapq

import numpy as np


def numbered(tokens_BT: np.ndarray, end_of_text: int | None) -> np.ndarray:
    """(B, T) int32: how many documents have begun in the row so far."""
    return np.cumsum(tokens_BT == end_of_text, axis=1, dtype=np.int32)


def packed(
    blocks_NS: np.ndarray, sequence_length: int, end_of_text: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and int32 numbers of the pieces in each row, (rows, T), of N blocks.

    `blocks_NS` are blocks with the token after each. Raises ValueError when T does not divide a block.
    """
    size = blocks_NS.shape[1] - 1
    if sequence_length < 1 or size % sequence_length:
        raise ValueError(
            f"sequence_length={sequence_length} does not divide block_tokens={size}; use a divisor of it, or "
            "set data.block_tokens to a multiple of every sequence length"
        )
    inputs, targets, numbers = [], [], []
    for block_S in blocks_NS:
        for row in pack(np.flatnonzero(block_S[:-1] == end_of_text).tolist(), size, sequence_length):
            places_T = np.concatenate([np.arange(start, start + length) for start, length in row])
            inputs.append(block_S[places_T])
            targets.append(block_S[places_T + 1])
            numbers.append(np.repeat(np.arange(len(row), dtype=np.int32), [length for _, length in row]))
    return np.stack(inputs), np.stack(targets), np.stack(numbers)


def pack(starts: list[int], size: int, sequence_length: int) -> list[list[tuple[int, int]]]:
    """The rows of a block of `size` tokens in which documents start at `starts`: (place, length) of pieces.

    A row begins with the beginning of a document wherever it holds one; rows come in the order of the stream.
    """
    places = sorted({0, *starts})
    rows: list[list[tuple[int, int]]] = []
    pieces = []
    for place, end in zip(places, [*places[1:], size], strict=True):
        while end - place >= sequence_length:
            rows.append([(place, sequence_length)])
            place += sequence_length
        if place < end:
            pieces.append((place - end, place))
    # (room, row), the least room first.
    rooms = [(sequence_length, index) for index in range(len(rows), size // sequence_length)]
    rows += [[] for _ in rooms]
    left = []
    for negative, place in sorted(pieces):
        found = bisect.bisect_left(rooms, (-negative, -1))
        if found == len(rooms):
            left.append((negative, place))
        else:
            room, index = rooms.pop(found)
            rows[index].append((place, -negative))
            if room + negative:
                bisect.insort(rooms, (room + negative, index))
    while left:
        negative, place = heapq.heappop(left)
        # A rest may fit by now.
        room, index = rooms.pop(min(bisect.bisect_left(rooms, (-negative, -1)), len(rooms) - 1))
        length = min(-negative, room)
        rows[index].append((place, length))
        if length < room:
            bisect.insort(rooms, (room - length, index))
        elif length < -negative:
            heapq.heappush(left, (negative + length, place + length))
    beginnings = set(starts)
    ordered = [sorted(row, key=lambda piece: (piece[0] not in beginnings, piece)) for row in rows]
    return sorted(ordered, key=min)
