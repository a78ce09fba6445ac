"""The rows of the cross-entropy head: of a row of logits, its loss and, in its place, its gradient.

The floor for 65,536 tokens of 50,304 logits in 16 bits, read once from memory, once from the cache and
written once: 4.4 ms at 3 TB/s. A bounded logit takes two exponentials and a reciprocal in each of two passes,
some 5.5 ms of the units that make them. Hence no running maximum and no division where neither is needed.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from sabrage.kernels.language import jit, tl

# A row of 50,304 logits takes thirteen turns, of which the last is almost empty.
BLOCK, NUM_WARPS = 4096, 16
# Up to this height of the bound, exp(-height) is far from the smallest fp32 number.
LOW_HEIGHT = 80.0


@jit
def _sunk(raw, slope, offset):
    """How far below its upper bound a logit lies, as a share of the height."""
    return 1 / (1 + tl.exp(raw * slope + offset))


@jit
def _log_sum_exp(base, columns, num_real, height, slope, offset, BOUNDED, LOW, BLOCK: tl.constexpr):
    """Of one row, in nats below the upper bound where there is one."""
    if LOW:
        # No logit lies below exp(-height): nothing to find out first, and one sum over threads at the end.
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_real, BLOCK):
            real = start + columns < num_real
            raw = tl.load(base + start + columns, mask=real, other=0.0, eviction_policy="evict_last")
            sunk = _sunk(raw.to(tl.float32), slope, offset)
            sums += tl.where(real, tl.exp(sunk * -height), 0.0)
        lse = tl.log(tl.sum(sums, 0))
    else:
        largest = -float("inf")
        total = 0.0
        for start in range(0, num_real, BLOCK):
            real = start + columns < num_real
            raw = tl.load(
                base + start + columns, mask=real, other=-float("inf"), eviction_policy="evict_last"
            )
            z = raw.to(tl.float32)
            if BOUNDED:
                # A bounded -inf would be a number: masked lanes are put out afterwards.
                z = tl.where(real, -height * _sunk(z, slope, offset), -float("inf"))
            new = tl.maximum(largest, tl.max(z, 0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), 0)
            largest = new
        lse = largest + tl.log(total)
    return lse


@jit
def _bounded(raw, height, width, slope, offset, BOUNDED):
    """(z, dz / draw), z being what `_log_sum_exp` is told of."""
    if BOUNDED:
        sunk = _sunk(raw, slope, offset)
        z = -height * sunk
        # Multiplied, not divided: divisions are what this kernel would wait for.
        steep = (sunk - sunk * sunk) * (height / width)
    else:
        z, steep = raw, 1.0
    return z, steep


@jit
def rows(
    logits,
    narrow,
    targets,
    coefficients,
    narrow_scale,
    nll,
    num_real,
    height,
    shift,
    width,
    stride,
    SETS: tl.constexpr,
    BOUNDED: tl.constexpr,
    LOW: tl.constexpr,
    LEARNS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: log-sum-exp, the loss of each set, then the gradient in place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    columns = tl.arange(0, BLOCK)
    slope = 1 / width if BOUNDED else 0.0
    offset = shift * slope
    lse = _log_sum_exp(base, columns, num_real, height, slope, offset, BOUNDED, LOW, BLOCK)
    weight = 0.0
    for index in tl.static_range(SETS):
        target = tl.load(targets + row * SETS + index)
        inside = (target >= 0) & (target < num_real)
        raw = tl.load(base + target, mask=inside, other=float("nan")).to(tl.float32)
        aimed_at, _unused = _bounded(raw, height, width, slope, offset, BOUNDED)
        tl.store(nll + row * SETS + index, tl.where(target < 0, 0.0, lse - aimed_at))
        weight += tl.where(target < 0, 0.0, tl.load(coefficients + index))
    if LEARNS:
        # No thread may overwrite a target's logit before every thread has read it.
        tl.debug_barrier()
        scale = 1 / tl.load(narrow_scale)
        for start in range(0, stride, BLOCK):
            real = start + columns < num_real
            again = tl.load(
                base + start + columns, mask=real, other=-float("inf"), eviction_policy="evict_first"
            )
            z, steep = _bounded(again.to(tl.float32), height, width, slope, offset, BOUNDED)
            grad = weight * tl.exp(z - lse) * steep
            for index in tl.static_range(SETS):
                column = tl.load(targets + row * SETS + index).to(tl.int32)
                coefficient = tl.load(coefficients + index)
                grad -= tl.where(start + columns == column, coefficient, 0.0) * steep
            grad = tl.where(real, grad, 0.0)
            tl.store(base + start + columns, grad.to(logits.dtype.element_ty), mask=start + columns < stride)
            if NARROW:
                tl.store(
                    narrow + row * stride + start + columns,
                    (grad * scale).to(narrow.dtype.element_ty),
                    mask=start + columns < stride,
                )
