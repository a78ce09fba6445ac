"""The decode step: one token in and one token out for every row of a batch, with nothing waiting between.

On CUDA the step is recorded once for each width and replayed: the host then starts one graph and not some
hundred kernels. The shapes are fixed, so rows without a sequence take part and leave no trace.
"""

import torch
from torch import Tensor

from sabrage.context import Context
from sabrage.generate.paged import PagedView
from sabrage.generate.sampling import Sampler
from sabrage.model.lm import LM


def next_logits(model: LM, view: PagedView, tokens_BT: Tensor, window: int | None) -> Tensor:
    """Reads the next tokens of the view's rows; returns the logits after the last of them, (B, V).

    Matrix products are in the format of the model's matrices; what else it keeps in fp32 stays so.
    """
    dtype, device = next(model.parameters()).dtype, tokens_BT.device.type
    # Nothing is cast that would be worth remembering, and a graph must not remember it.
    with torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        positions_BT = view.begin(tokens_BT.shape[1])
        h_BTD = model(tokens_BT, Context(positions_BT=positions_BT, cache=view, window=window))
        return model.head(h_BTD[:, -1])


class DecodeStep:
    """step() -> the next token of every row, (B,) int64, on the device.

    Reads the view and the sampler, which the caller has brought up to date, and `tokens_B1`, the newest
    tokens, which it replaces. `graphs` records; `window` is the plan's, as in `Context`.
    """

    def __init__(
        self, model: LM, view: PagedView, sampler: Sampler, *, graphs: bool, window: int | None = None
    ) -> None:
        self.model, self.view, self.sampler, self.window = model, view, sampler, window
        rows, device = len(view.shown), view.cache.device
        self.tokens_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.chosen_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.graphs: dict[tuple[int, int | None, bool], torch.cuda.CUDAGraph] | None = {} if graphs else None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        cut = self.sampler.cut
        if self.graphs is None:
            self.forward(cut)
        else:
            key = (self.view.width, self.view.run, cut)
            if key not in self.graphs:
                self.graphs[key] = self.record(cut)
            self.graphs[key].replay()
        self.tokens_B1.copy_(self.chosen_B[:, None])
        return self.chosen_B

    def forward(self, cut: bool) -> None:
        """The whole step; running it twice is running it once."""
        self.sampler.see(self.tokens_B1)
        logits_BV = next_logits(self.model, self.view, self.tokens_B1, self.window)
        self.chosen_B.copy_(self.sampler(logits_BV, cut=cut))

    def record(self, cut: bool) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph of the view's present width."""
        graph = torch.cuda.CUDAGraph()
        earlier = next(iter(self.graphs.values()), None) if self.graphs else None
        with torch.cuda.device(self.tokens_B1.device):
            aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                # Libraries set themselves up, and kernels are compiled, before the recording.
                for _ in range(2):
                    self.forward(cut)
            current.wait_stream(aside)
            with torch.cuda.graph(graph, pool=earlier.pool() if earlier else None):
                self.forward(cut)
        return graph
