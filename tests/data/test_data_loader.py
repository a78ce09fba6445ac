import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sabrage.data.stream import QUEUE_STEPS, Loader, ShardStream

quick = settings(deadline=None, derandomize=True, max_examples=30)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = [(8, 16), (8, 32), (4, 32), (8, 48), (2, 16), (16, 32)]


def make_stream():
    return ShardStream(np.split(np.arange(400, dtype=np.uint16), [150, 290]), block_tokens=16)


def collect(**options):
    with Loader(make_stream(), shapes=SHAPES, **options) as loader:
        return list(loader)


class Watched:
    """A stream that counts what is read from it and can fail."""

    block_tokens, blocks_per_epoch = 16, 100

    def __init__(self, *, fail_at=None):
        self.num_reads = 0
        self.fail_at = fail_at
        self.full = threading.Event()

    def rows(self, first_block, num_blocks, sequence_length):
        if self.num_reads == self.fail_at:
            raise OSError("the disk went away")
        self.num_reads += 1
        if self.num_reads == QUEUE_STEPS:
            self.full.set()
        return np.zeros((num_blocks * 16 // sequence_length, sequence_length + 1), np.uint16)


def test_steps_have_their_shapes_and_targets_are_one_further_on():
    steps = collect()
    assert [tuple(tokens.shape) for tokens, _ in steps] == [(n // t, t) for t, n in SHAPES]
    for tokens_BT, targets_BT in steps:
        assert tokens_BT.dtype == targets_BT.dtype == torch.int64
        assert tokens_BT.is_contiguous()
        assert targets_BT.is_contiguous()
        assert torch.equal(tokens_BT + 1, targets_BT)


def test_steps_follow_one_another_in_the_stream():
    stream = make_stream()
    inputs = torch.cat([tokens.flatten() for tokens, _ in collect()])
    blocks = sum(tokens for _, tokens in SHAPES) // 16
    assert torch.equal(inputs, torch.from_numpy(stream.rows(0, blocks, 16)[:, :-1].ravel().astype(np.int64)))


@quick
@given(st.integers(0, len(SHAPES)))
def test_a_resumed_loader_goes_on_with_the_same_steps(start):
    with Loader(make_stream(), shapes=SHAPES) as loader:
        for _ in range(start):
            next(loader)
        state = {"start_step": loader.next_step, "start_block": loader.next_block}
    rest = collect()[start:]
    for options in (state, {"start_step": start}):
        resumed = collect(**options)
        assert len(resumed) == len(rest)
        assert all(
            torch.equal(a, b) for pair in zip(resumed, rest, strict=True) for a, b in zip(*pair, strict=True)
        )


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_share_every_row_exactly_once_and_in_order(world_size):
    whole = collect()
    shares = [collect(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, pieces in zip(whole, zip(*shares, strict=True), strict=True):
        for index in (0, 1):
            assert torch.equal(torch.cat([piece[index] for piece in pieces]), step[index])


@quick
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3))
def test_ranks_partition_the_rows_for_any_world(world_size, rows_per_rank, num_steps):
    stream = ShardStream([np.arange(1000, dtype=np.uint16)], block_tokens=2)
    shapes = [(2, 2 * world_size * rows_per_rank)] * num_steps
    inputs = []
    for rank in range(world_size):
        with Loader(stream, shapes=shapes, rank=rank, world_size=world_size) as loader:
            inputs.append([tokens for tokens, _ in loader])
    joined = torch.cat([torch.cat(pieces) for pieces in zip(*inputs, strict=True)]).flatten()
    assert torch.equal(joined, torch.arange(2 * world_size * rows_per_rank * num_steps))


def test_a_function_gives_shapes_for_ever():
    with Loader(make_stream(), shapes=lambda step: (8, 16 * (1 + step % 2)), start_step=3) as loader:
        assert [next(loader)[0].numel() for _ in range(40)] == [32, 16] * 20
        assert (loader.next_step, loader.next_block) == (43, 64)


def test_it_reads_a_few_steps_ahead_and_no_more():
    stream = Watched()
    loader = Loader(stream, shapes=lambda step: (16, 16))
    assert stream.full.wait(30)
    loader.close()
    assert stream.num_reads == QUEUE_STEPS


def test_close_ends_the_thread_wherever_it_is():
    before = threading.active_count()
    for taken in (0, 1, QUEUE_STEPS + 1):
        with Loader(Watched(), shapes=lambda step: (16, 16)) as loader:
            for _ in range(taken):
                next(loader)
        assert threading.active_count() == before


def test_a_closed_loader_says_so():
    loader = Loader(Watched(), shapes=lambda step: (16, 16))
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_error_of_the_thread_reaches_the_consumer_after_the_good_steps():
    with Loader(Watched(fail_at=2), shapes=lambda step: (16, 16)) as loader:
        next(loader)
        next(loader)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk went away"):
                next(loader)


def test_the_end_of_the_steps_stays_the_end():
    with Loader(make_stream(), shapes=SHAPES[:1]) as loader:
        assert len(list(loader)) == 1
        assert list(loader) == []


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8, 20), {}, "tokens_per_step=20 is not a multiple"),
        ((3, 48), {}, "sequence_length=3 does not divide"),
        ((16, 48), {"rank": 0, "world_size": 2}, "cannot be shared by 2 ranks"),
    ],
)
def test_a_shape_that_cannot_be_cut_is_refused_with_the_remedy(shape, options, message):
    with Loader(make_stream(), shapes=[shape], **options) as loader, pytest.raises(ValueError, match=message):
        next(loader)


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank=2, allowed: 0 to 1"):
        Loader(make_stream(), shapes=SHAPES, rank=2, world_size=2)


@pytest.mark.gpu
@needs_cuda
def test_steps_on_the_gpu_equal_those_on_the_cpu():
    for on_gpu, on_cpu in zip(collect(device="cuda"), collect(), strict=True):
        for one, other in zip(on_gpu, on_cpu, strict=True):
            assert one.device.type == "cuda"
            assert torch.equal(one.cpu(), other)
