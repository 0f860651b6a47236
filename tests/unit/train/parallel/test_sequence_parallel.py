"""The attention mask of packed documents under sequence parallelism."""

from __future__ import annotations

import torch

from longhaul.train.parallel.sequence_parallel import document_mask


def test_tokens_attend_only_to_their_own_document():
    """transformers finds documents in the same way, by positions that restart; padding is a document of its own."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1]])
    documents = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    expected = (documents[:, None] == documents[None, :]).tril()
    mask = document_mask(positions)
    known = document_mask(positions, has_several_documents=True)
    assert mask is not None and torch.equal(mask[0, 0], expected)
    assert known is not None and torch.equal(known, mask)


def test_rows_of_one_document_need_no_mask():
    assert document_mask(torch.arange(8).repeat(3, 1)) is None
    assert document_mask(torch.arange(8).repeat(3, 1), has_several_documents=False) is None
    assert document_mask(torch.stack([torch.arange(8), torch.arange(8) % 5])) is not None
