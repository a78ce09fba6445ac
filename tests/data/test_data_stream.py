import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sabrage.data.stream import ShardStream, blocks_of, sufficiency
from sabrage.parts import DataError

quick = settings(deadline=None, derandomize=True, max_examples=60)
block_sizes = st.sampled_from([1, 2, 4, 8])
shard_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def number(lengths):
    """Shards whose tokens are all different."""
    ends = list(itertools.accumulate(lengths))
    return [np.arange(end - length, end, dtype=np.uint16) for length, end in zip(lengths, ends, strict=True)]


def stream_of(lengths, block_tokens):
    """A stream over shards of these lengths, one more added that holds at least a block."""
    shards = number([*lengths, block_tokens + 3])
    return ShardStream(shards, block_tokens=block_tokens), shards


def baseline_order(shards, batch, length, num_batches):
    """The NoCap script's loader, as its description has it: (inputs, targets) of each micro-batch."""
    shard, position = 0, 0
    for _ in range(num_batches):
        piece = shards[shard][position : position + batch * length + 1]
        yield piece[:-1].reshape(batch, length), piece[1:].reshape(batch, length)
        position += batch * length
        if position + batch * length + 1 > len(shards[shard]):
            shard, position = (shard + 1) % len(shards), 0


def test_the_order_is_the_baselines_over_shard_ends_and_epochs():
    shards = number([100, 33, 47, 64, 65])
    stream = ShardStream(shards, block_tokens=32)
    for block, (inputs, targets) in enumerate(baseline_order(shards, 4, 8, 25)):
        rows = stream.rows(block, 1, 8)
        assert np.array_equal(rows[:, :-1], inputs)
        assert np.array_equal(rows[:, 1:], targets)


@quick
@given(shard_lengths, block_sizes)
def test_an_epoch_has_every_target_once_but_the_dropped_tails(lengths, block_tokens):
    stream, shards = stream_of(lengths, block_tokens)
    kept = [shard[1 : 1 + (len(shard) - 1) // block_tokens * block_tokens] for shard in shards]
    rows = stream.rows(0, stream.blocks_per_epoch, block_tokens)
    assert np.array_equal(rows[:, 1:].ravel(), np.concatenate(kept))
    assert np.array_equal(rows[:, :-1].ravel() + 1, rows[:, 1:].ravel())


@quick
@given(shard_lengths, block_sizes, st.integers(0, 100), st.lists(st.integers(0, 9), max_size=6))
def test_any_split_and_any_start_give_the_same_stream(lengths, block_tokens, start, splits):
    stream, _ = stream_of(lengths, block_tokens)
    whole = stream.rows(0, start + sum(splits), block_tokens)[start:]
    places = itertools.accumulate([start, *splits])
    pieces = [stream.rows(place, count, block_tokens) for place, count in zip(places, splits, strict=False)]
    assert np.array_equal(np.concatenate([whole[:0], *pieces]), whole)


@quick
@given(shard_lengths, st.integers(0, 20), st.integers(0, 9), st.sampled_from([1, 2, 4, 8]))
def test_the_sequence_length_does_not_change_the_tokens(lengths, start, count, sequence_length):
    stream, _ = stream_of(lengths, 8)
    short, long = stream.rows(start, count, sequence_length), stream.rows(start, count, 8)
    assert short.shape == (count * 8 // sequence_length, sequence_length + 1)
    assert np.array_equal(short[:, 1:].ravel(), long[:, 1:].ravel())
    assert np.array_equal(short[:, :-1].ravel(), long[:, :-1].ravel())


def test_after_the_last_shard_comes_the_first():
    stream, _ = stream_of([20], 4)
    assert np.array_equal(stream.rows(stream.blocks_per_epoch, 3, 4), stream.rows(0, 3, 4))


def test_a_sequence_length_that_does_not_divide_a_block_is_refused():
    stream, _ = stream_of([], 8)
    with pytest.raises(ValueError, match="sequence_length=3 does not divide block_tokens=8"):
        stream.rows(0, 1, 3)


def test_a_negative_block_is_refused():
    stream, _ = stream_of([], 8)
    with pytest.raises(ValueError, match="first_block=-1"):
        stream.rows(-1, 1, 8)


def test_data_without_one_whole_block_is_refused_with_its_source():
    with pytest.raises(DataError, match=r"mine: .* 8 tokens, one block takes 9"):
        ShardStream(number([8, 2]), block_tokens=8, source="mine")


def test_sufficiency_counts_the_tokens_of_an_epoch():
    stream, _ = stream_of([21, 9], 8)
    report = sufficiency(stream, 60)
    assert (report.available, report.needed, report.epochs) == (32, 60, 1.875)
    assert not report.suffices
    assert sufficiency(stream, 32).suffices


def test_a_step_of_broken_blocks_is_refused_with_two_that_would_do():
    assert blocks_of(64, 16) == 4
    with pytest.raises(ValueError, match=r"tokens_per_step=70 .* use 64 or 80"):
        blocks_of(70, 16)
