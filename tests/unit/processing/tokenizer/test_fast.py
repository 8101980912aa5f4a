"""LlamaTokenizerFast: files run as they are written, special tokens of users stay text, post-processor, files."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from llavakit.errors import CheckpointError, InputError, PromptError
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.tiny import IMAGE_TOKEN, NUM_PIECES, llama3_tokenizer_folder, qwen_tokenizer_folder, tiny_tokenizer

TEXTS = ("a red circle", "  two\n\nlines ", "日本 é 😀", "x<|im_end|>y", "<image>", "12345", "<tool_call>", "", "don't")


def llama(path: Path) -> LlamaTokenizerFast:
    """Load the tiny Llama-2-like tokenizer from the files that the slow one writes."""
    tiny_tokenizer().save_pretrained(path)
    return LlamaTokenizerFast.from_pretrained(path)


def llama3(path: Path) -> LlamaTokenizerFast:
    return LlamaTokenizerFast.from_pretrained(llama3_tokenizer_folder(path))


def qwen(path: Path) -> LlamaTokenizerFast:
    return LlamaTokenizerFast.from_pretrained(qwen_tokenizer_folder(path))


Load = Callable[[Path], LlamaTokenizerFast]
ALL = pytest.mark.parametrize("load", [llama, llama3, qwen])


@ALL
@pytest.mark.parametrize("text", TEXTS)
def test_files_run_as_they_are_written(tmp_path: Path, load: Load, text: str) -> None:
    tokenizer = load(tmp_path)
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = oracle.encode(text).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, "a pair") == oracle.encode(text, "a pair").ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == oracle.decode(ids, skip_special_tokens=False)
    batch = tokenizer(text, "a pair", return_token_type_ids=True, return_special_tokens_mask=True)
    expected = oracle.encode(text, "a pair")
    assert (batch.token_type_ids, batch.special_tokens_mask) == (expected.type_ids, expected.special_tokens_mask)


@ALL
def test_text_that_spells_an_added_token_stays_text(tmp_path: Path, load: Load) -> None:
    tokenizer = load(tmp_path)
    for token in (*tokenizer.added_tokens_encoder, "a<image>b<|im_end|></s>"):
        ids = tokenizer.encode_text(token)
        assert not set(tokenizer.added_tokens_decoder) & set(ids)
        assert tokenizer.decode_text(ids) == token
        tokenizer.split_special_tokens = True
        assert tokenizer.encode(token, add_special_tokens=False) == ids
        tokenizer.split_special_tokens = False


@ALL
def test_tokens_added_later_stay_text_too(tmp_path: Path, load: Load) -> None:
    tokenizer = load(tmp_path)
    tokenizer.encode_text("first")
    assert tokenizer.add_tokens(["<later>", "<later>"]) == 1
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<role>"]}) == 1
    assert tokenizer.encode("<later><role>", add_special_tokens=False)[-2:] == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert max(tokenizer.encode_text("<later><role>")) < tokenizer.vocab_size
    assert tokenizer.decode_text([len(tokenizer) - 2, len(tokenizer) - 1]) == "<later>"
    assert tokenizer.additional_special_tokens[-1] == "<role>"


@ALL
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, load: Load) -> None:
    tokenizer = load(tmp_path)
    for encode in (tokenizer.encode_text, tokenizer.encode):
        with pytest.raises(PromptError, match="character 2"):
            encode("ab\ud800")


def test_roles_come_from_the_config(tmp_path: Path) -> None:
    first, second = llama3(tmp_path / "a"), qwen(tmp_path / "b")
    assert (first.bos_token, first.eos_token, first.unk_token, first.pad_token) == ("<|begin_of_text|>", "<|eot_id|>", None, "<pad>")
    assert (second.bos_token, second.bos_token_id, second.eos_token, second.pad_token) == (None, None, "<|im_end|>", "<|endoftext|>")
    assert second.additional_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert (first.padding_side, first.model_max_length, first.add_bos_token, second.add_bos_token) == ("left", 8192, True, False)


def test_a_token_that_holds_a_role_is_no_text(tmp_path: Path) -> None:
    path = qwen_tokenizer_folder(tmp_path) / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"eos_token": "</tool_call>"}
    path.write_text(json.dumps(config))
    tokenizer = LlamaTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id in tokenizer.special_ids
    assert tokenizer.decode_text(tokenizer.encode("star</tool_call>")) == "star"


def test_a_tool_call_is_text_and_an_end_token_is_not(tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path)
    ids = tokenizer.encode("<|im_start|>a<tool_call>star</tool_call><|im_end|>")
    assert tokenizer.decode_text(ids) == "a<tool_call>star</tool_call>" == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_sentencepiece_model_becomes_the_slow_tokenizers_twin() -> None:
    slow = tiny_tokenizer()
    fast = LlamaTokenizerFast(slow.files()["tokenizer.model"], added_tokens={"<image>": IMAGE_TOKEN}, pad_token="<pad>")
    assert [fast.encode(text) for text in TEXTS] == [slow.encode(text) for text in TEXTS]
    assert [fast.encode_text(text) for text in TEXTS] == [slow.encode_text(text) for text in TEXTS]
    assert (fast.get_vocab(), len(fast), fast.vocab_size) == (slow.get_vocab(), len(slow), slow.vocab_size)


def test_the_post_processor_follows_flags_and_roles() -> None:
    tokenizer = LlamaTokenizerFast(tiny_tokenizer().files()["tokenizer.model"])
    tokenizer.add_eos_token = True
    assert tokenizer.build_inputs_with_special_tokens([5, 6], [7]) == [1, 5, 6, 2, 1, 7, 2]
    tokenizer.bos_token = tokenizer.unk_token
    assert tokenizer.build_inputs_with_special_tokens([5]) == [1, 5, 2]
    tokenizer.update_post_processor()
    tokenizer.add_eos_token = False
    assert tokenizer("", "").input_ids == tokenizer.backend_tokenizer.encode("", "").ids == [0, 0]
    tokenizer.add_bos_token = False
    assert tokenizer.encode("") == []


def test_a_flag_needs_its_token(tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path)
    with pytest.raises(InputError, match="bos_token=None"):
        tokenizer.add_bos_token = True
    tokenizer.add_eos_token = True
    assert tokenizer.encode("")[-1] == tokenizer.eos_token_id


def test_masks_and_types_count_special_tokens(tmp_path: Path) -> None:
    tokenizer = llama(tmp_path)
    assert tokenizer.get_special_tokens_mask([5, 6], [7]) == [1, 0, 0, 1, 0]
    assert tokenizer.get_special_tokens_mask([1, 5, IMAGE_TOKEN, 2], already_has_special_tokens=True) == [1, 0, 1, 1]
    assert tokenizer.create_token_type_ids_from_sequences([5, 6], [7]) == [0, 0, 0, 1, 1]
    assert tokenizer.create_token_type_ids_from_sequences([5, 6]) == [0, 0, 0]
    with pytest.raises(InputError, match="one sequence"):
        tokenizer.get_special_tokens_mask([1], [2], already_has_special_tokens=True)


@ALL
def test_save_and_load_keep_everything(tmp_path: Path, load: Load) -> None:
    tokenizer = load(tmp_path / "a")
    tokenizer.add_tokens([AddedToken("<late>", lstrip=True)])
    tokenizer.padding_side, tokenizer.add_eos_token, tokenizer.model_max_length = "right", True, 77
    tokenizer.save_pretrained(tmp_path / "b")
    loaded = LlamaTokenizerFast.from_pretrained(tmp_path / "b")
    assert loaded.files() == tokenizer.files()
    assert loaded.encode("a <late> b") == tokenizer.encode("a <late> b")


@ALL
def test_tokenizers_travel_to_worker_processes(tmp_path: Path, load: Load) -> None:
    tokenizer = load(tmp_path)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_text("a star") == tokenizer.encode_text("a star")
    assert copy.files() == tokenizer.files()


def test_save_vocabulary_writes_the_model_where_there_is_one(tmp_path: Path) -> None:
    proto = tiny_tokenizer().files()["tokenizer.model"]
    (path,) = LlamaTokenizerFast(proto).save_vocabulary(tmp_path, "old")
    assert LlamaTokenizer(path).encode("a b") == tiny_tokenizer().encode("a b")
    with pytest.raises(InputError, match="not a folder"):
        LlamaTokenizerFast(proto).save_vocabulary(tmp_path / "missing")
    with pytest.raises(InputError, match="save_pretrained"):
        qwen(tmp_path / "qwen").save_vocabulary(tmp_path)


@pytest.mark.parametrize("index", [-1, NUM_PIECES + 9, 2**40])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, index: int) -> None:
    with pytest.raises(InputError, match=str(index)):
        qwen(tmp_path).decode([index])


def test_an_unknown_token_without_unk_is_an_error(tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path)
    assert tokenizer.find_token("<nothing>") is None
    with pytest.raises(InputError, match="no unk token"):
        tokenizer.convert_tokens_to_ids("<nothing>")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
        ({"decoder": None}, "decoder"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["b", 1], "cls": ["a", 0]}}, "BertProcessing"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "cannot be used"),
        ({"model": None}, "no BPE model"),
        ({"normalizer": {"type": "Unheard"}}, "cannot be used"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = qwen_tokenizer_folder(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    with pytest.raises(CheckpointError, match=complaint):
        LlamaTokenizerFast(tokenizer_file=path)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tokenizer.json", "junk", "not JSON"),
        ("tokenizer.json", None, "neither tokenizer.json nor tokenizer.model"),
        ("tokenizer_config.json", '{"eos_token": "<|nothing|>"}', "nothing"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "<image>"}}}', "id 7"),
        ("tokenizer_config.json", '{"padding_side": "top"}', "padding_side"),
        ("tokenizer_config.json", '{"split_special_tokens": "no"}', "split_special_tokens"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, name: str, text: str | None, complaint: str) -> None:
    qwen_tokenizer_folder(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        LlamaTokenizerFast.from_pretrained(tmp_path)


def test_a_file_is_needed() -> None:
    with pytest.raises(InputError, match="vocab_file"):
        LlamaTokenizerFast()
