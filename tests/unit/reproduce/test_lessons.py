"""Lessons: what is supervised, and that a sample depends on its index alone."""

import functools

import pytest

from llavakit.processing.chat import TEMPLATES
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.reproduce.lessons import Lessons
from llavakit.reproduce.vocabulary import train_tokenizer

PIECES = 512


@functools.cache
def tokenizer_model() -> bytes:
    return train_tokenizer(PIECES, "A chat.", 1, num_scenes=60)


def processor(template: str) -> LlavaProcessor:
    return LlavaProcessor(
        tokenizer=LlamaTokenizer(tokenizer_model(), added_tokens={"<image>": PIECES}),
        image_processor=ImageProcessor(size_px=32, crop_px=32, aspect="pad"),
        template=TEMPLATES[template],
        image_token_id=PIECES,
        patch_size=8,
    )


def test_captions_supervise_the_caption_alone() -> None:
    lessons = Lessons("captions", 5, processor("plain"))
    sample = lessons.sample(0)
    assert sample.ids.count(PIECES) == 16
    assert not any(counts for index, counts in zip(sample.ids, sample.loss_mask, strict=True) if index == PIECES)
    assert all(sample.loss_mask[17:])


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_every_answer_ends_supervised(kind: str) -> None:
    lessons = Lessons(kind, 5, processor("v1"))  # type: ignore[arg-type]
    eos = lessons.processor.tokenizer.eos_token_id
    for index in range(8):
        sample = lessons.sample(index)
        assert sample.ids[-1] == eos
        assert [counts for token, counts in zip(sample.ids, sample.loss_mask, strict=True) if token == eos] == [True] * sample.ids.count(
            eos
        )
        assert 0 < sum(sample.loss_mask) < len(sample.ids)


def test_sample_depends_on_its_index_alone() -> None:
    first, again = Lessons("instructions", 5, processor("v1")), Lessons("instructions", 5, processor("v1"))
    first.sample(3)
    one, other = first.sample(9), again.sample(9)
    assert one.ids == other.ids
    assert one.tiles_N3SS.equal(other.tiles_N3SS)
    assert first.sample(10).ids != one.ids
