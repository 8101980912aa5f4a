"""Samples and batches: errors name their sample, digests tell batches apart."""

import dataclasses

import pytest
import torch

from llavakit.errors import DataError, ImageError
from llavakit.training.data import Sample, batch_digest, draw_sample
from tests.toy_run import toy_source


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def sample(self, index: int) -> Sample:
        raise self.error


def test_an_error_of_the_package_names_its_sample() -> None:
    with pytest.raises(DataError, match="sample 7: not a picture"):
        draw_sample(Failing(ImageError("not a picture")), 7)


def test_a_bug_keeps_its_type_and_notes_its_sample() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        draw_sample(Failing(ZeroDivisionError()), 7)
    assert caught.value.__notes__ == ["while building sample 7"]


def test_digest_depends_on_every_tensor_and_nothing_else() -> None:
    batch = toy_source().batch(3).batch
    assert batch_digest(batch) == batch_digest(toy_source().batch(3).batch)
    assert batch_digest(batch) != batch_digest(toy_source().batch(4).batch)
    assert batch_digest(batch) != batch_digest(dataclasses.replace(batch, pixels_N3SS=torch.zeros(1, 3, 2, 2)))
    assert batch_digest(batch) != batch_digest(dataclasses.replace(batch, labels_T=batch.labels_T.flip(0)))
