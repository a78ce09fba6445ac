"""Every operation of this room, for tests and benchmarks to walk through."""

from sabrage.kernels import cross_entropy
from sabrage.kernels.cases import Operation

OPERATIONS: tuple[Operation, ...] = (cross_entropy.OPERATION,)
