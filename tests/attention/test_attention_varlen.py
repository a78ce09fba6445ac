"""Where the sequences of a flat batch begin."""

import torch
from attention_cases import DOCUMENTS, Case

from sabrage.attention.varlen import starts

CPU = torch.device("cpu")


def test_without_documents_every_row_is_a_sequence():
    starts_N, fits = starts(None, 3, 5, CPU)
    assert starts_N.tolist() == [0, 5, 10, 15]
    assert starts_N.dtype == torch.int32
    assert fits is None


def test_documents_begin_where_their_number_changes_and_with_every_row():
    documents_BT = Case("", documents=DOCUMENTS).context().documents_BT
    starts_N, fits = starts(documents_BT, 2, 217, CPU)
    # Room for one document a row and one for every 64 tokens, eight in all; what is left has no tokens.
    assert starts_N.tolist() == [0, 5, 135, 217, 433, 434, 434, 434, 434]
    assert fits
    # A document that ends one row and begins the next, under one number, is two.
    same_BT = torch.zeros(2, 64, dtype=torch.long)
    assert starts(same_BT, 2, 64, CPU)[0].tolist() == [0, 64, 128, 128, 128]


def test_too_many_documents_are_noticed():
    documents_BT = torch.arange(128).view(2, 64) // 20
    assert not starts(documents_BT, 2, 64, CPU)[1]
