"""Ids equal sentencepiece's own on drawn texts without special tokens: 2,000 always, 100,000 in the soak; so do texts decoded."""

import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from benchmarks.harness import write_result
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.real_data import shared_data
from tests.unit.processing.tokenizer.golden import drawn_texts

TINY = Path(__file__).parents[1] / "unit" / "processing" / "tokenizer" / "tiny.model"
SPECIALS = ("<s>", "</s>", "<unk>")


def count_differences(model: Path, count: int) -> dict[str, Any]:
    """Count texts on which a tokenizer's ids, or their text, are not sentencepiece's."""
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    slow, plain, fast = LlamaTokenizer(model), LlamaTokenizer(model, legacy=False), LlamaTokenizerFast(model)
    encoders = {
        "legacy": lambda text: slow.encode(text, add_special_tokens=False),
        "not_legacy": lambda text: plain.encode(text, add_special_tokens=False),
        "fast": lambda text: fast.encode(text, add_special_tokens=False),
        "encode_text": slow.encode_text,
        "fast_encode_text": fast.encode_text,
    }
    differences = dict.fromkeys((*encoders, "decode_text", "fast_decode_text"), 0)
    num_texts = num_tokens = 0
    for text in drawn_texts(seed=7, count=count, with_marks=False):
        if any(special in text for special in SPECIALS):
            continue
        expected = oracle.encode(text)
        num_texts, num_tokens = num_texts + 1, num_tokens + len(expected)
        for name, encode in encoders.items():
            differences[name] += encode(text) != expected
        for name, tokenizer in (("decode_text", slow), ("fast_decode_text", fast)):
            differences[name] += tokenizer.decode_text(expected) != oracle.decode(expected)
    return {"num_texts": num_texts, "num_tokens": num_tokens, "differences": differences}


@pytest.mark.parametrize("is_real", [False, True], ids=["tiny", "llama2"])
def test_2_000_texts(is_real: bool) -> None:
    found = count_differences(shared_data() / "llama2-tokenizer.model" if is_real else TINY, 2000)
    assert found["num_texts"] > 1990
    assert set(found["differences"].values()) == {0}


@pytest.mark.soak
def test_100_000_texts() -> None:
    start = time.perf_counter()
    models = {"tiny": TINY, "llama2": shared_data() / "llama2-tokenizer.model"}
    found = {name: count_differences(model, 100_000) for name, model in models.items()}
    write_result("tokenizer_strings", "make soak", {"seconds": round(time.perf_counter() - start, 1), **found})
    assert all(set(each["differences"].values()) == {0} for each in found.values())
    assert all(each["num_texts"] > 99_500 for each in found.values())
