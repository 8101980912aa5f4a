"""LlamaTokenizer: equal to transformers 4.37's slow tokenizer on recorded cases; special tokens, batches, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llavakit.errors import CheckpointError, InputError, PromptError
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.real_data import llama2_tokenizer
from tests.tiny import IMAGE_TOKEN, NUM_PIECES, tiny_tokenizer

GOLDEN: dict[str, list[Any]] = json.loads((Path(__file__).parent / "slow_437.json").read_text("utf-8"))


def test_encode_equals_transformers_437() -> None:
    tokenizer = llama2_tokenizer()
    assert [[text, tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)] for text, *_ in GOLDEN["enc"]] == GOLDEN["enc"]


def test_encode_pairs_equals_transformers_437() -> None:
    tokenizer = llama2_tokenizer()
    assert [[first, second, tokenizer.encode(first, second)] for first, second, _ in GOLDEN["pairs"]] == GOLDEN["pairs"]


def test_tokenize_equals_transformers_437() -> None:
    tokenizer = llama2_tokenizer()
    assert [[text, tokenizer.tokenize(text)] for text, _ in GOLDEN["tokens"]] == GOLDEN["tokens"]


def test_decode_equals_transformers_437() -> None:
    tokenizer = llama2_tokenizer()
    assert [[ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)] for ids, *_ in GOLDEN["dec"]] == GOLDEN["dec"]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "<image>", "<pad>", "<0x0A>", "a</s>b <image>", "USER: </s>"])
def test_encode_text_knows_no_special_token(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_text(text)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode_text(ids) == text


def test_encode_text_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(PromptError, match="character 2"):
        tiny_tokenizer().encode_text("ab\ud800")


def test_decode_text_drops_what_is_no_text() -> None:
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer.encode_text("a red circle"), IMAGE_TOKEN, NUM_PIECES + 60, tokenizer.eos_token_id]
    assert tokenizer.decode_text(ids) == "a red circle"


@pytest.mark.parametrize("index", [-200, -1, NUM_PIECES + 2, 10**9])
def test_ids_outside_the_vocabulary_are_refused(index: int) -> None:
    with pytest.raises(InputError, match=str(index)):
        tiny_tokenizer().decode([index])


def test_added_tokens_follow_the_pieces() -> None:
    tokenizer = LlamaTokenizer(tiny_tokenizer().files()["tokenizer.model"])
    before = tokenizer.pad_token_id
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 1
    assert tokenizer.add_tokens(["<image>", "<image>", "</s>"]) == 1
    assert (before, tokenizer.pad_token_id) == (None, NUM_PIECES)
    assert (tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer)) == (NUM_PIECES + 1, NUM_PIECES + 2)
    assert tokenizer.encode("a<image>")[-1] == NUM_PIECES + 1


def test_pad_token_must_exist() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="add_special_tokens"):
        tokenizer.pad_token = "<nothing>"
    tokenizer.pad_token = tokenizer.unk_token
    assert tokenizer.pad_token_id == tokenizer.unk_token_id


@pytest.mark.parametrize("index", [5, NUM_PIECES - 1])
def test_added_tokens_cannot_take_a_piece(index: int) -> None:
    with pytest.raises(CheckpointError, match=f"id {index}"):
        LlamaTokenizer(tiny_tokenizer().files()["tokenizer.model"], added_tokens={"<image>": index})


@pytest.mark.parametrize(("side", "expected"), [("right", [1, 1, 0]), ("left", [0, 1, 1])])
def test_batches_are_padded_on_their_side(side: Any, expected: list[int]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    batch = tokenizer(["</s>", "</s></s>"], padding=True)
    assert batch["attention_mask"] == [expected, [1, 1, 1]]
    assert batch["input_ids"][0][expected.index(0)] == tokenizer.pad_token_id


def test_batches_become_tensors() -> None:
    tokenizer = tiny_tokenizer()
    batch = tokenizer(["a", "a red circle"], padding=True, return_tensors="pt")
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert tokenizer("a", return_tensors="pt")["input_ids"].shape[0] == 1
    with pytest.raises(InputError, match="padding=True"):
        tokenizer(["a", "a red circle"], return_tensors="pt")


def test_padding_needs_a_pad_token() -> None:
    tokenizer = LlamaTokenizer(tiny_tokenizer().files()["tokenizer.model"])
    with pytest.raises(InputError, match="pad token"):
        tokenizer(["a", "a red circle"], padding=True)


def test_max_length_cuts_text_but_not_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_eos_token = True
    ids = tokenizer("a red circle and two blue squares", max_length=4)["input_ids"]
    assert len(ids) == 4
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side, tokenizer.add_eos_token, tokenizer.model_max_length = "left", True, 77
    tokenizer.save_pretrained(tmp_path)
    loaded = LlamaTokenizer.from_pretrained(tmp_path)
    assert loaded.files() == tokenizer.files()
    assert loaded.encode("a <image> b</s>") == tokenizer.encode("a <image> b</s>")


def test_save_vocabulary_writes_the_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (path,) = tokenizer.save_vocabulary(tmp_path, "old")
    assert Path(path) == tmp_path / "old-tokenizer.model"
    assert LlamaTokenizer(path).encode("a b") == tokenizer.encode("a b")
    with pytest.raises(InputError, match="not a folder"):
        tokenizer.save_vocabulary(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tokenizer.model", "junk", "sentencepiece"),
        ("tokenizer.model", "", "sentencepiece|bos"),
        ("tokenizer.model", None, "LlamaTokenizerFast"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {}, "eos_token": "<|im_end|>"}', "im_end"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "<image>"}}}', "id 5"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "<image>"}}', "added tokens"),
        ("added_tokens.json", '{"<image>": "x"}', "added tokens"),
        ("added_tokens.json", '{"<image>": -3}', "id -3"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, name: str, text: str | None, complaint: str) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        LlamaTokenizer.from_pretrained(tmp_path)
