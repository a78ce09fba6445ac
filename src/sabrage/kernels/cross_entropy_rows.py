"""The rows of the cross-entropy head: of a row of logits, its loss and, in its place, its gradient.

The floor for 65,536 tokens of 50,304 logits in 16 bits, read once from memory, once from the cache and
written once: 4.4 ms at 3 TB/s. A bounded logit takes two exponentials and half a root in each of two passes,
some 4.5 ms of the units that make them; all other instructions must hide behind these. Hence no running
maximum where none is needed, logits counted in bits (exp2 is one instruction, exp and its guards for the
smallest numbers are several), masks only where a row ends, and what is a target's own when its row is done.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from sabrage.kernels.language import jit, tl

# A row of 50,304 logits takes thirteen turns, of which the last is almost empty.
BLOCK, NUM_WARPS = 4096, 16
# Up to this height of the bound, exp(-height) is far from the smallest fp32 number.
LOW_HEIGHT = 80.0


@jit
def _sunk(raw, slope, offset, PAIRS: tl.constexpr):
    """How far below its upper bound a logit lies, as a share of the height: 1 / (1 + exp2(...)).

    The reciprocal is the square of a root, which is one instruction; the division has guards as exp has. In
    PAIRS two neighbours share it, 1 / a = b / (a b), and if one is NaN so is the other.
    """
    # Two of these may be multiplied; beyond 60 bits below the bound no sum changes any more.
    power = tl.minimum(raw.to(tl.float32) * slope + offset, 60.0, propagate_nan=tl.PropagateNan.ALL)
    whole = 1 + tl.exp2(power)
    if PAIRS:
        left, right = tl.split(tl.reshape(whole, (whole.shape[0] // 2, 2)))
        root = tl.rsqrt(left * right)
        both = root * root
        sunk = tl.interleave(both * right, both * left)
    else:
        root = tl.rsqrt(whole)
        sunk = root * root
    return sunk


@jit
def _scored(raw, bound, BOUNDED: tl.constexpr, PAIRS: tl.constexpr):
    """(z in bits, below the upper bound where there is one; dz / draw as a share of height / width)."""
    slope, offset, height = bound
    if BOUNDED:
        sunk = _sunk(raw, slope, offset, PAIRS)
        z, steep = sunk * -height, sunk - sunk * sunk
    else:
        z, steep = raw.to(tl.float32) * slope, 1.0
    return z, steep


@jit
def _block(base, at, shared, BOUNDED, SAMPLED, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    """`_scored` of the columns `at`; of a block that is not WHOLE, z is -inf where a column is not real,
    whatever is there: its probability is 0, and so is its gradient. SAMPLED, a column counts exp2 of its
    `sample` times. `shared` is what all rows have in common: (num_real, stride, bound, sample).

    The load is masked by the stride, a multiple of 16, and not by the vocabulary: a mask that can end between
    eight neighbours makes eight loads of one.
    """
    num_real, stride, bound, sample = shared
    if WHOLE:
        z, steep = _scored(tl.load(base + at, eviction_policy=EVICTION), bound, BOUNDED, True)
    else:
        raw = tl.load(base + at, mask=at < stride, other=0.0, eviction_policy=EVICTION)
        z, steep = _scored(tl.where(at < num_real, raw, 0.0), bound, BOUNDED, True)
        z = tl.where(at < num_real, z, -float("inf"))
    if SAMPLED:
        # The same for all rows, so that it stays in the cache.
        bits = tl.load(sample + at) if WHOLE else tl.load(sample + at, mask=at < num_real, other=0.0)
        z += bits.to(tl.float32)
    return z, steep


@jit
def _joined(largest, total, z):
    """The maximum and the sum relative to it, with a block more."""
    new = tl.maximum(largest, tl.max(z, 0))
    return new, total * tl.exp2(largest - new) + tl.sum(tl.exp2(z - new), 0)


@jit
def _log_sum_exp(base, columns, shared, BOUNDED, LOW, SAMPLED, BLOCK: tl.constexpr):
    """Of one row, in bits."""
    num_real = shared[0]
    whole = num_real // BLOCK * BLOCK
    if LOW:
        # No logit lies below exp(-height): nothing to find out first, and one sum over threads at the end.
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, whole, BLOCK):
            z, _steep = _block(base, start + columns, shared, BOUNDED, SAMPLED, True, "evict_last")
            sums += tl.exp2(z)
        for start in range(whole, num_real, BLOCK):
            z, _steep = _block(base, start + columns, shared, BOUNDED, SAMPLED, False, "evict_last")
            sums += tl.exp2(z)
        lse = tl.log2(tl.sum(sums, 0))
    else:
        largest = -float("inf")
        total = 0.0
        for start in range(0, whole, BLOCK):
            z, _steep = _block(base, start + columns, shared, BOUNDED, SAMPLED, True, "evict_last")
            largest, total = _joined(largest, total, z)
        for start in range(whole, num_real, BLOCK):
            z, _steep = _block(base, start + columns, shared, BOUNDED, SAMPLED, False, "evict_last")
            largest, total = _joined(largest, total, z)
        lse = largest + tl.log2(total)
    return lse


@jit
def _turn(base, narrow, at, shared, lse, pull, scale, BOUNDED, NARROW, SAMPLED, WHOLE: tl.constexpr):
    """A block of the gradient of the log-sum-exp times `pull`, in place of the logits."""
    z, steep = _block(base, at, shared, BOUNDED, SAMPLED, WHOLE, "evict_first")
    grad = tl.exp2(z - lse) * steep * pull
    inside = None if WHOLE else at < shared[1]
    tl.store(base + at, grad.to(base.dtype.element_ty), mask=inside)
    if NARROW:
        tl.store(narrow + at, (grad * scale).to(narrow.dtype.element_ty), mask=inside)


@jit
def rows(
    logits,
    narrow,
    targets,
    coefficients,
    narrow_scale,
    nll,
    sample,
    num_real,
    height,
    shift,
    width,
    stride,
    SETS: tl.constexpr,
    BLOCK_SETS: tl.constexpr,
    BOUNDED: tl.constexpr,
    LOW: tl.constexpr,
    LEARNS: tl.constexpr,
    NARROW: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: log-sum-exp, the loss of each set, then the gradient in place of the logits.

    SAMPLED, `sample` holds what is added to each column's logits, in bits.
    """
    row = tl.program_id(0).to(tl.int64)
    base, narrow = logits + row * stride, narrow + row * stride
    columns = tl.arange(0, BLOCK)
    # Bits in a nat.
    bits = 1.4426950408889634
    slope = bits / width if BOUNDED else bits
    bound = (slope, shift * slope, height * bits)
    shared = (num_real, stride, bound, sample)
    lse = _log_sum_exp(base, columns, shared, BOUNDED, LOW, SAMPLED, BLOCK)

    sets = tl.arange(0, BLOCK_SETS)
    targets_W = tl.load(targets + row * SETS + sets, mask=sets < SETS, other=-1)
    weights_W = tl.load(coefficients + sets, mask=targets_W >= 0, other=0.0)
    real_W = (targets_W >= 0) & (targets_W < num_real)
    raw_W = tl.load(base + targets_W, mask=real_W, other=float("nan"))
    z_W, steep_W = _scored(raw_W, bound, BOUNDED, False)
    nll_W = tl.where(targets_W < 0, 0.0, (lse - z_W) * (1 / bits))
    tl.store(nll + row * SETS + sets, nll_W, mask=sets < SETS)
    if LEARNS:
        # No thread may overwrite a target's logit before every thread has read it.
        tl.debug_barrier()
        scale = 1 / tl.load(narrow_scale)
        steepest = height / width if BOUNDED else 1.0
        weight = tl.sum(weights_W, 0)
        pull, whole = weight * steepest, num_real // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            at = start + columns
            _turn(base, narrow, at, shared, lse, pull, scale, BOUNDED, NARROW, SAMPLED, True)
        for start in range(whole, stride, BLOCK):
            at = start + columns
            _turn(base, narrow, at, shared, lse, pull, scale, BOUNDED, NARROW, SAMPLED, False)
        # What is a target's own, so that no other logit need be compared with it. Sets that share a target
        # store the same number there.
        same_WW = targets_W[:, None] == targets_W[None, :]
        own_W = tl.sum(tl.where(same_WW, weights_W[None, :], 0.0), 1)
        grad_W = (weight * tl.exp2(z_W - lse) - own_W) * steep_W * steepest
        # No thread may store it before every thread has stored its blocks.
        tl.debug_barrier()
        tl.store(base + targets_W, grad_W.to(base.dtype.element_ty), mask=real_W)
        if NARROW:
            tl.store(narrow + targets_W, (grad_W * scale).to(narrow.dtype.element_ty), mask=real_W)
