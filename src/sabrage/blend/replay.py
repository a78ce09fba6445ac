"""Small work that is done again and again: on CUDA recorded once as a graph and replayed from then on.

A hundred small kernels take a GPU less time than launching them one by one takes the host. See "CUDA Graphs"
in torch's notes on CUDA: what is recorded reads and writes the same memory every time, so inputs that change
are written into tensors that stay.
"""

import warnings
from collections.abc import Callable

import torch

# Calls before the one that is recorded: what is made once, such as an optimizer's state, is there by then.
CALLS_BEFORE = 3


class Replay:
    """Calls `work`, which neither waits for the device nor branches on its numbers; off CUDA that is all.

    The fourth call is recorded. `clear` frees what `work` must find missing then, such as gradients, so that
    the graph makes its own.
    """

    def __init__(
        self, work: Callable[[], object], device: torch.device, *, clear: Callable[[], object]
    ) -> None:
        self.work, self.clear, self.device = work, clear, device
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # Work that is recorded must be on another stream than the usual one from the start.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> None:
        if self.stream is None:
            self.work()
            return
        self.calls += 1
        if self.graph is None:
            self.aside(self.stream)
        if self.graph is not None:
            self.graph.replay()

    def end(self) -> None:
        """Waits for the device and frees the graph, which must not go while it runs."""
        if self.graph is not None:
            torch.cuda.synchronize(self.device)
            self.graph = None
            self.clear()

    def aside(self, stream: torch.cuda.Stream) -> None:
        """Does the work on a stream of its own, or records it there, which does nothing yet."""
        usual = torch.cuda.current_stream(self.device)
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            if self.calls <= CALLS_BEFORE:
                self.work()
            else:
                self.record()
        usual.wait_stream(stream)

    def record(self) -> None:
        """Makes the graph; where the device refuses, the work is done as it is, from now on."""
        self.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as that of the loader, may go on asking for memory.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.work()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, which is slower: {error}", stacklevel=2)
            self.stream = None
            self.clear()
            self.work()
        else:
            self.graph = graph
