"""Documents kept apart and packed: nothing is lost or repeated, and no row mixes what it does not say."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sabrage.data.embedded import EmbeddedText
from sabrage.data.folder import ShardFolder
from sabrage.data.packing import pack, packed
from sabrage.data.shards import write_shard
from sabrage.data.stream import Loader, ShardStream, sufficiency
from sabrage.parts import DataError

quick = settings(deadline=None, derandomize=True, max_examples=60)
END = 9
SHAPES = [(8, 32), (8, 64), (16, 32), (4, 64), (32, 32), (8, 32)]


@st.composite
def blocks(draw):
    """(places where documents start, tokens of the block, tokens of a row)."""
    sequence_length = draw(st.sampled_from([1, 2, 4, 8, 16]))
    size = sequence_length * draw(st.integers(1, 8))
    return sorted(draw(st.sets(st.integers(0, size - 1), max_size=12))), size, sequence_length


def make_stream(*, seed=0, lengths=(150, 90, 333), block_tokens=32):
    """Random tokens below END, an end of text before about every sixth, in several shards."""
    generator = np.random.default_rng(seed)
    shards = []
    for length in lengths:
        shard = generator.integers(END, size=length)
        shard[generator.random(length) < 1 / 6] = END
        shards.append(shard.astype(np.uint16))
    return ShardStream(shards, block_tokens=block_tokens)


def collect(order, *, shapes=SHAPES, **options):
    with Loader(make_stream(), shapes=shapes, order=order, end_of_text=END, **options) as loader:
        return list(loader)


def pairs(inputs, targets):
    """Every input with its target, as one sorted list of numbers."""
    return np.sort(np.asarray(inputs).ravel().astype(np.int64) * 16 + np.asarray(targets).ravel())


@quick
@given(blocks())
def test_rows_are_full_and_hold_every_place_of_the_block_once(block):
    starts, size, sequence_length = block
    rows = pack(starts, size, sequence_length)
    assert [sum(length for _, length in row) for row in rows] == [sequence_length] * (size // sequence_length)
    places = [place + index for row in rows for place, length in row for index in range(length)]
    assert sorted(places) == list(range(size))


@quick
@given(blocks())
def test_no_piece_reaches_into_another_document(block):
    starts, size, sequence_length = block
    for row in pack(starts, size, sequence_length):
        for place, length in row:
            assert not set(starts) & set(range(place + 1, place + length))


@quick
@given(blocks())
def test_a_row_begins_with_a_document_wherever_it_holds_the_beginning_of_one(block):
    starts, size, sequence_length = block
    for row in pack(starts, size, sequence_length):
        begins = [place in starts for place, _ in row]
        assert begins == sorted(begins, reverse=True)


@pytest.mark.parametrize(
    ("lengths", "cut"),
    [
        ((3, 5, 4, 4), 0),
        ((1, 7, 2, 6, 3, 5), 0),
        ((2, 6, 3, 3, 2, 8), 0),
        ((8, 8), 0),
        ((20, 4), 0),
        ((5, 5, 6), 1),
        ((6, 6, 6, 6), 1),
    ],
)
def test_only_documents_that_fit_nowhere_are_cut(lengths, cut):
    starts = [0, *itertools.accumulate(lengths)][:-1]
    rows = pack(starts, sum(lengths), 8)
    whole = {piece for row in rows for piece in row}
    short = [(start, length) for start, length in zip(starts, lengths, strict=True) if length <= 8]
    assert len([document for document in short if document not in whole]) == cut


def test_packing_cuts_far_fewer_documents_than_the_stream():
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(4.5, 1, 500).astype(int) + 2
    starts = np.concatenate([[0], np.cumsum(lengths)])
    size = starts[-1] // 256 * 256
    starts = starts[starts < size].tolist()
    ends = [*starts[1:], size]
    short = [(start, end - start) for start, end in zip(starts, ends, strict=True) if end - start <= 256]
    whole = {piece for row in pack(starts, size, 256) for piece in row}
    cut_in_stream = [start for start, length in short if start // 256 != (start + length - 1) // 256]
    assert len([document for document in short if document not in whole]) < len(cut_in_stream) / 10


@quick
@given(st.integers(0, 20), st.integers(1, 9), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_every_input_keeps_the_target_that_it_has_in_the_stream(start, count, sequence_length):
    stream = make_stream()
    blocks_NS = stream.rows(start, count, 32)
    inputs, targets, numbers = packed(blocks_NS, sequence_length, END)
    assert inputs.shape == targets.shape == numbers.shape == (count * 32 // sequence_length, sequence_length)
    rows = 32 // sequence_length
    for index, block_S in enumerate(blocks_NS):
        mine = slice(index * rows, (index + 1) * rows)
        assert np.array_equal(pairs(inputs[mine], targets[mine]), pairs(block_S[:-1], block_S[1:]))


@quick
@given(st.integers(0, 20), st.sampled_from([4, 8, 16, 32]))
def test_a_target_is_the_next_input_of_its_document_or_what_follows_it_in_the_text(start, sequence_length):
    inputs, targets, numbers = packed(make_stream().rows(start, 3, 32), sequence_length, END)
    inside = np.diff(numbers, axis=1) == 0
    assert np.array_equal(targets[:, :-1][inside], inputs[:, 1:][inside])
    # Within a piece no document begins, so that an end of text as a target is the last.
    assert not (inputs[:, 1:][inside] == END).any()
    assert numbers.dtype == np.int32
    assert (numbers[:, 0] == 0).all()


def test_an_epoch_over_all_shard_ends_has_every_pair_of_the_stream_once_in_any_order():
    stream = make_stream()
    shapes = [(8, 32)] * stream.blocks_per_epoch
    found = [
        pairs(*(torch.cat([step[index] for step in collect(order, shapes=shapes)]) for index in (0, 1)))
        for order in ("stream", "masked", "documents")
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert len(found[0]) == sufficiency(stream, 1).available


def test_masked_rows_are_those_of_the_stream_with_documents_counted_from_their_inputs():
    for (tokens_BT, targets_BT), masked in zip(collect("stream"), collect("masked"), strict=True):
        assert torch.equal(masked[0], tokens_BT)
        assert torch.equal(masked[1], targets_BT)
        assert masked[2].dtype == torch.int32
        assert torch.equal(masked[2], (tokens_BT == END).cumsum(1).int())


def test_a_change_of_the_sequence_length_repeats_and_loses_nothing():
    blocks_read = sum(tokens for _, tokens in SHAPES) // 32
    stretch = make_stream().rows(0, blocks_read, 32)
    steps = collect("documents")
    got = pairs(*(torch.cat([step[index].flatten() for step in steps]) for index in (0, 1)))
    assert np.array_equal(got, pairs(stretch[:, :-1], stretch[:, 1:]))


@pytest.mark.parametrize("order", ["masked", "documents"])
@pytest.mark.parametrize("start", range(len(SHAPES) + 1))
def test_a_resumed_loader_goes_on_with_the_same_rows_and_documents(order, start):
    with Loader(make_stream(), shapes=SHAPES, order=order, end_of_text=END) as loader:
        for _ in range(start):
            next(loader)
        state = {"start_step": loader.next_step, "start_block": loader.next_block}
    resumed, rest = collect(order, **state), collect(order)[start:]
    assert len(resumed) == len(rest)
    for one, other in zip(resumed, rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("order", ["masked", "documents"])
def test_ranks_share_every_row_with_its_documents(order):
    shapes = [(8, 32), (4, 64), (16, 32)]
    whole = collect(order, shapes=shapes)
    shares = [collect(order, shapes=shapes, rank=rank, world_size=2) for rank in range(2)]
    for step, *pieces in zip(whole, *shares, strict=True):
        assert len(step) == 3
        for index, tensor in enumerate(step):
            assert torch.equal(torch.cat([piece[index] for piece in pieces]), tensor)


def test_a_sequence_length_that_does_not_divide_a_block_is_refused():
    with pytest.raises(ValueError, match="sequence_length=12 does not divide block_tokens=32"):
        packed(make_stream().rows(0, 1, 32), 12, END)


def test_shards_without_an_end_of_text_cannot_be_cut_into_documents(tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.bin", np.arange(100))
    source = ShardFolder(path=str(tmp_path), vocab_size=257, block_tokens=16, order="documents")
    with pytest.raises(DataError, match=r"holds no end of text \(token 256\).* use data.order=stream"):
        source.open()
    write_shard(tmp_path / "train.bin", np.array([256, *range(99)]))
    assert source.open().end_of_text == 256


def test_the_embedded_text_can_be_packed():
    corpus = EmbeddedText(block_tokens=256, order="documents").open()
    loader = Loader(corpus.train, shapes=[(64, 512)], order="documents", end_of_text=corpus.end_of_text)
    with loader:
        tokens_BT, _, documents_BT = next(loader)
    assert documents_BT.shape == tokens_BT.shape == (8, 64)
    assert (tokens_BT == 256).any()
