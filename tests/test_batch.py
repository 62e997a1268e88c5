"""The declaration of a batch: what is collated has the axes and the dtypes that it declares."""

import numpy as np
import pytest
import torch

from src.common.batch import ENTRIES, Batch, Reads
from src.data.answer_batches import GROUP, PREFERENCE, collate_answers
from src.data.answer_example import AnswerGroup
from src.data.collate import collate
from src.data.file_documents import Document


def document(*ids):
    return Document(np.array(ids), np.array([0, *[0.5] * (len(ids) - 1)], np.float32))


def group(*answers):
    return AnswerGroup.of(
        np.array([1, 2, 3]),
        [list(a) for a in answers],
        [0.5] * len(answers),
        [np.zeros(len(a)) for a in answers],
    )


BATCHES = {
    "documents": collate([[document(1, 2, 3), document(4, 5)], [document(6, 7)]], 3.0),
    "groups": collate_answers([[group((4, 5), (6,))], [group((7,), (8, 9, 1))]], 4.0, columns=GROUP),
    "shared prompts": collate_answers([[group((4, 5), (6,))]], 4.0, shared=True, columns=GROUP),
}


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_collated_is_as_declared(name):
    """Axes of one name have one size, and zeros() of these sizes has the shapes and dtypes."""
    tensors, sizes = BATCHES[name].tensors(), {}
    assert len(tensors) > 3
    for entry, tensor in tensors.items():
        for axis, size in zip(ENTRIES[entry]["axes"], tensor.shape, strict=True):
            assert sizes.setdefault(axis, size) == size, (entry, axis)
    zeros = Batch.zeros(tensors, sizes, Reads()).tensors()
    assert zeros.keys() == tensors.keys()
    for entry, tensor in tensors.items():
        assert (zeros[entry].shape, zeros[entry].dtype) == (tensor.shape, tensor.dtype), entry


def test_parts_are_the_chunks_of_the_rows():
    """A chunk behind the last one, which another rank has, is a token without loss."""
    rows = [[document(*range(1, 8)), document(9, 8)], [document(5, 6, 7)]]
    batch = collate(rows, 1.0, chunk=3)
    parts = [batch.part(i) for i in range(3)]
    assert [part.ids.shape[1] for part in parts] == [3, 3, 1]
    for entry, axis in (("ids", 1), ("reset", 1), ("targets", 0), ("weights", 0), ("where", 0)):
        assert torch.equal(torch.cat([getattr(part, entry) for part in parts], axis), getattr(batch, entry))
    behind = batch.part(3)
    assert behind.ids.shape == (2, 1) and not len(behind.targets) and behind.reset is None


def test_an_entry_that_is_not_declared_is_an_error():
    with pytest.raises(TypeError, match="refrence"):
        BATCHES["documents"].having(refrence=torch.zeros(1))
    assert PREFERENCE.of_answers in ENTRIES and PREFERENCE.of_tokens in ENTRIES
