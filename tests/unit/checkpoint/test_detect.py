"""checkpoint.detect: content decides, and what is not read is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from llavakit.checkpoint.detect import Kind, detect_kind, foreign_kind
from llavakit.errors import CheckpointError


def test_kinds_that_are_read() -> None:
    assert detect_kind({"model_type": "llava", "text_config": {}, "mm_hidden_size": 3}) is Kind.LLAVA_HF
    assert detect_kind({"model_type": "llama"}) is Kind.DECODER
    assert detect_kind({"model_type": "llava", "mm_vision_tower": "openai/clip"}) is Kind.ORIGINAL
    assert detect_kind({"model_type": "llava_llama", "mm_hidden_size": 1024}) is Kind.ORIGINAL


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "llava"}, "neither text_config"),
        ({"model_type": "llava_onevision", "text_config": {}}, "'llava_onevision'; llava and llava_next"),
        ({}, "None"),
    ],
)
def test_other_kinds_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        detect_kind(values)


def test_code_in_the_checkpoint_is_ignored_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llavakit"):
        assert detect_kind({"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}) is Kind.DECODER
    assert "never run" in caplog.text


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["mm_projector.bin"], "projector"),
        (["params.json"], None),
        ([], None),
    ],
)
def test_folders_without_config(files: list[str], named: str | None) -> None:
    found = foreign_kind(files)
    assert found is None if named is None else named in str(found)
