"""A cache in pages of one latent layer, for tests."""

import torch

from sabrage.context import Pages


class Paged:
    """Pages of one layer in an order of their own, NaN where nothing was written, for rows of any lengths."""

    paged = True

    def __init__(self, past_BSX, lengths, *, pages=3, size=64):
        batch = len(lengths)
        generator = torch.Generator().manual_seed(7)
        self.table_BN = torch.randperm(batch * pages, generator=generator).int().view(batch, pages)
        self.table_BN = self.table_BN.to(past_BSX.device)
        self.pages_PSX = past_BSX.new_full((batch * pages, size, past_BSX.shape[2]), float("nan"))
        self.lengths_B = torch.zeros(batch, dtype=torch.int32, device=past_BSX.device)
        for b, length in enumerate(lengths):
            self.put(b, past_BSX[b, :length])

    def put(self, b, new_TX):
        for entry in new_TX:
            page, place = divmod(int(self.lengths_B[b]), self.pages_PSX.shape[1])
            self.pages_PSX[self.table_BN[b, page], place] = entry
            self.lengths_B[b] += 1

    def append(self, layer, latent):
        for b, new_TX in enumerate(latent):
            self.put(b, new_TX)
        return {"latent": Pages(self.pages_PSX, self.table_BN, self.lengths_B)}
