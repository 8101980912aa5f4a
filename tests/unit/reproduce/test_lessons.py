"""Lessons: what is supervised, and that a sample depends on its index alone."""

import pytest

from llavakit.reproduce.lessons import Lessons
from tests.tiny import IMAGE_TOKEN, tiny_processor


def test_captions_supervise_the_caption_alone() -> None:
    lessons = Lessons("captions", 5, tiny_processor("plain"))
    sample = lessons.sample(0)
    assert sample.ids.count(IMAGE_TOKEN) == 16
    assert not any(counts for index, counts in zip(sample.ids, sample.loss_mask, strict=True) if index == IMAGE_TOKEN)
    assert all(sample.loss_mask[17:])


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_every_answer_ends_supervised(kind: str) -> None:
    lessons = Lessons(kind, 5, tiny_processor("v1"))  # type: ignore[arg-type]
    eos = lessons.processor.tokenizer.eos_token_id
    for index in range(8):
        sample = lessons.sample(index)
        assert sample.ids[-1] == eos
        assert [counts for token, counts in zip(sample.ids, sample.loss_mask, strict=True) if token == eos] == [True] * sample.ids.count(
            eos
        )
        assert 0 < sum(sample.loss_mask) < len(sample.ids)


def test_sample_depends_on_its_index_alone() -> None:
    first, again = Lessons("instructions", 5, tiny_processor("v1")), Lessons("instructions", 5, tiny_processor("v1"))
    first.sample(3)
    one, other = first.sample(9), again.sample(9)
    assert one.ids == other.ids
    assert one.tiles_N3SS.equal(other.tiles_N3SS)
    assert first.sample(10).ids != one.ids
