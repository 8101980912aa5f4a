"""Parity of the fast tokenizer and its files with transformers 5.x, on Llama-3's and Qwen's kind."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from tests.tiny import llama3_tokenizer_folder, qwen_tokenizer_folder
from tests.unit.processing.tokenizer.golden import texts

KINDS = pytest.mark.parametrize("write", [llama3_tokenizer_folder, qwen_tokenizer_folder])
MARKED = ("<|begin_of_text|>a", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>", "<image>\nWhat?<|eot_id|>", "<tool_call>x</tool_call>")


@KINDS
def test_loaded_and_saved_files_equal_transformers(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    tokenizer = LlamaTokenizerFast.from_pretrained(write(tmp_path / "original"))
    tokenizer.save_pretrained(tmp_path / "saved")
    for folder in ("original", "saved"):
        oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path / folder)
        for text in (*texts(), *MARKED):
            ids = oracle.encode(text)
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == oracle.decode(ids, clean_up_tokenization_spaces=False)
            assert tokenizer.decode_text(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        roles = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        assert [getattr(tokenizer, role) for role in roles] == [getattr(oracle, role) for role in roles]


@KINDS
def test_batches_equal_transformers(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    tokenizer, oracle = LlamaTokenizerFast.from_pretrained(write(tmp_path)), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    oracle.padding_side = "left"
    expected = oracle(["a red circle", "two"], padding=True, return_tensors="pt")
    batch = tokenizer(["a red circle", "two"], padding=True, return_tensors="pt")
    assert {name: batch[name].tolist() for name in batch} == {name: expected[name].tolist() for name in batch}
