"""Calls, padding, special roles: what both tokenizers share, on the slow one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from llavakit.errors import CheckpointError, ConfigError, InputError
from llavakit.processing.tokenizer.batch import Batch
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.tiny import IMAGE_TOKEN, NUM_PIECES, tiny_tokenizer

LONG, SHORT = "a red circle and two blue squares", "a"


def bare(**options: Any) -> LlamaTokenizer:
    return LlamaTokenizer(Path(__file__).parent / "tiny.model", **options)


def test_a_batch_is_a_mapping_with_attributes() -> None:
    batch = tiny_tokenizer()([LONG, SHORT], padding=True, return_tensors="pt")
    assert isinstance(batch, Mapping)
    assert set({**batch}) == {"input_ids", "attention_mask"}
    assert batch.input_ids is batch["input_ids"]
    assert batch.to("meta").input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="no column 'labels'"):
        batch.labels  # noqa: B018


def test_columns_come_when_they_are_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    batch = tokenizer(LONG, SHORT, return_token_type_ids=True, return_special_tokens_mask=True, return_length=True)
    length = len(batch.input_ids)
    assert batch.length == length
    assert batch.token_type_ids == tokenizer.create_token_type_ids_from_sequences(tokenizer.encode_text(LONG), tokenizer.encode_text(SHORT))
    assert batch.special_tokens_mask == tokenizer.get_special_tokens_mask(tokenizer.encode_text(LONG), tokenizer.encode_text(SHORT))
    assert "attention_mask" not in tokenizer(LONG, return_attention_mask=False)


def test_arrays_have_one_axis_more() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.encode(SHORT, return_tensors="np").shape == (1, 2)
    assert tokenizer.encode(SHORT, return_tensors="np").dtype == np.int64
    assert torch.equal(tokenizer.encode(SHORT, return_tensors="pt"), torch.tensor([tokenizer.encode(SHORT)]))
    assert tokenizer([], return_tensors="np").input_ids.shape == (0,)


def test_padding_stops_at_multiples() -> None:
    tokenizer = tiny_tokenizer()
    width = len(tokenizer.encode(LONG))
    assert {len(row) for row in tokenizer([LONG, SHORT], padding=True, pad_to_multiple_of=64).input_ids} == {64}
    assert {len(row) for row in tokenizer([LONG, SHORT], padding="max_length", max_length=width + 3).input_ids} == {width + 3}
    tokenizer.model_max_length = width + 1
    assert len(tokenizer(SHORT, padding="max_length").input_ids) == width + 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_fills_what_calls_returned(side: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    expected = tokenizer([LONG, SHORT], padding=True, return_special_tokens_mask=True)
    rows = [tokenizer(text, return_special_tokens_mask=True) for text in (LONG, SHORT)]
    assert tokenizer.pad(rows) == expected
    assert tokenizer.pad(tokenizer([LONG, SHORT], return_special_tokens_mask=True)) == expected
    assert torch.equal(tokenizer.pad(rows, return_tensors="pt").attention_mask, torch.tensor(expected.attention_mask))
    single = tokenizer.pad({"input_ids": torch.tensor([5, 6])}, pad_to_multiple_of=4)
    assert sorted(single.attention_mask) == [0, 0, 1, 1]


def test_pad_needs_ids() -> None:
    with pytest.raises(InputError, match="input_ids"):
        tiny_tokenizer().pad({"labels": [1]})


@pytest.mark.parametrize("strategy", ["only_first", "only_second", "longest_first", True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_frame(strategy: Any, side: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side, tokenizer.add_eos_token = side, True
    first, second = tokenizer.encode_text(LONG), tokenizer.encode_text(LONG)
    kept = len(first) + len(second) - 5
    ids = tokenizer(LONG, LONG, truncation=strategy, max_length=kept + 4).input_ids
    num_first = {"only_first": len(first) - 5, "only_second": len(first)}.get(strategy, len(first) - 2)
    num_second = kept - num_first
    cut = [row[-count:] if side == "left" else row[:count] for row, count in ((first, num_first), (second, num_second))]
    assert ids == tokenizer.build_inputs_with_special_tokens(*cut)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"padding": "widest"}, "widest"),
        ({"truncation": "all"}, "all"),
        ({"max_length": -1}, "0 or more"),
        ({"truncation": "only_second", "max_length": 3}, "is missing"),
        ({"truncation": "only_first", "max_length": 1}, "longest_first"),
        ({"truncation": True, "padding": True, "max_length": 6, "pad_to_multiple_of": 4}, "multiple"),
        ({"return_tensors": "tf"}, "tf"),
        ({"text_pair": [SHORT]}, "equally long"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        tiny_tokenizer()(LONG, **options)


def test_batches_hold_texts() -> None:
    with pytest.raises(InputError, match="text_pair"):
        tiny_tokenizer()([("a", "b")])  # type: ignore[list-item]


def test_the_limit_of_the_model_cuts_when_asked() -> None:
    tokenizer = tiny_tokenizer()
    whole = tokenizer.encode(LONG)
    assert tokenizer(LONG, truncation=True).input_ids == whole
    tokenizer.model_max_length = 4
    assert tokenizer(LONG, truncation=True).input_ids == whole[:4]
    assert tokenizer(LONG).input_ids == whole


def test_the_documentations_tip_adds_a_pad_token() -> None:
    tokenizer = bare()
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 1
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", NUM_PIECES, NUM_PIECES + 1)
    assert tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>", "<pad>"]
    assert tokenizer.add_special_tokens({"pad_token": "</s>"}) == 0
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_every_role_can_be_given() -> None:
    tokenizer = bare(bos_token="<bos>", additional_special_tokens=["<a>", AddedToken("<b>", special=True)])
    assert (tokenizer.bos_token_id, tokenizer.encode("")) == (NUM_PIECES, [NUM_PIECES])
    assert tokenizer.additional_special_tokens_ids == [NUM_PIECES + 1, NUM_PIECES + 2]
    assert tokenizer.add_special_tokens({"cls_token": "<c>", "sep_token": "<c>", "mask_token": "<a>"}) == 1
    assert tokenizer.special_tokens_map["mask_token"] == "<a>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<d>"]}, replace_additional_special_tokens=False)
    assert tokenizer.additional_special_tokens == ["<a>", "<b>", "<d>"]
    tokenizer.pad_token_id = NUM_PIECES + 2
    assert tokenizer.pad_token == "<b>"
    tokenizer.pad_token = None
    assert "pad_token" not in tokenizer.special_tokens_map
    with pytest.raises(InputError, match="image_token"):
        tokenizer.add_special_tokens({"image_token": "<image>"})
    with pytest.raises(InputError, match="<none>"):
        tokenizer.additional_special_tokens = ["<none>"]


def test_a_role_that_every_llama_has_cannot_be_missing() -> None:
    tokenizer = bare()
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="no bos_token"):
        tokenizer.encode("a")
    tokenizer.add_bos_token = False
    assert tokenizer.encode("a") == tokenizer.encode_text("a")


def test_plain_added_tokens_are_text() -> None:
    tokenizer = bare()
    assert tokenizer.add_tokens("<tool>") == 1
    ids = tokenizer.encode("a <tool>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a  <tool>"
    assert tokenizer.decode_text(ids) == "a <tool>"
    assert tokenizer.add_tokens("<tool>", special_tokens=True) == 0


@pytest.mark.parametrize(
    ("flags", "text", "legacy", "plain"),
    [
        ({"lstrip": True}, "a  of b", "▁a|▁▁b", "▁a|▁b"),
        ({"rstrip": True}, "a of  b", "▁a▁|▁b", "▁a▁|b"),
        ({"single_word": True}, "soft of", "▁sof▁t▁|", "▁soft▁|"),
        ({"single_word": True}, "of, of of a", "▁of,▁|▁▁|▁▁a", "▁of,▁|▁|▁a"),
        ({"lstrip": True, "rstrip": True, "single_word": True}, " of  of of, of", "||▁of,|", "▁||of,|"),
    ],
)
def test_added_tokens_heed_their_flags_as_in_437(flags: dict[str, bool], text: str, legacy: str, plain: str) -> None:
    for tokenizer, expected in ((bare(), legacy), (bare(legacy=False), plain)):
        tokenizer.add_tokens([AddedToken("of", **flags)])
        assert "".join("|" if piece == "of" else piece for piece in tokenizer.tokenize(text)) == expected


def test_split_special_tokens_makes_them_text() -> None:
    tokenizer = bare(split_special_tokens=True)
    assert tokenizer.encode("a</s>") == [1, *tokenizer.encode_text("a</s>")]


def test_cleaning_up_removes_spaces_of_english() -> None:
    tokenizer = bare(clean_up_tokenization_spaces=True)
    ids = tokenizer.encode_text("it is n't so . well , 's ?")
    assert tokenizer.decode(ids) == "it isn't so. well,'s?"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "it is n't so . well , 's ?"


def test_ids_may_be_tensors() -> None:
    tokenizer = tiny_tokenizer()
    batch = tokenizer([LONG, SHORT], padding=True, return_tensors="pt")
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == [LONG, SHORT]
    assert tokenizer.decode(batch.input_ids.numpy()[1], skip_special_tokens=True) == SHORT
    assert tokenizer.decode(torch.tensor(1)) == tokenizer.decode(1) == "<s>"


def test_lists_and_single_values_are_converted() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_tokens_to_ids(["<s>", "<image>", "nothing"]) == [1, IMAGE_TOKEN, 0]
    assert tokenizer.convert_ids_to_tokens([1, IMAGE_TOKEN, 3], skip_special_tokens=True) == ["<0x00>"]
    assert tokenizer.get_vocab()["<image>"] == IMAGE_TOKEN
    assert tokenizer.added_tokens_decoder[IMAGE_TOKEN].special


def test_options_are_kept_in_files(tmp_path: Path) -> None:
    tokenizer = bare(
        legacy=False,
        pad_token="<pad>",
        additional_special_tokens=["<a>"],
        truncation_side="left",
        use_default_system_prompt=True,
        spaces_between_special_tokens=True,
        sp_model_kwargs={"alpha": 0.2},
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = LlamaTokenizer.from_pretrained(tmp_path)
    assert loaded.files() == tokenizer.files()
    assert (loaded.legacy, loaded.truncation_side, loaded.additional_special_tokens) == (False, "left", ["<a>"])
    assert (loaded.use_default_system_prompt, loaded.sp_model_kwargs) == (True, {"alpha": 0.2})
    assert loaded.encode("<a> b") == tokenizer.encode("<a> b")


def test_unknown_options_of_sentencepiece_are_refused() -> None:
    with pytest.raises(ConfigError, match="sp_model_kwargs"):
        bare(sp_model_kwargs={"speed": 3})


@pytest.mark.parametrize("legacy", [True, False])
def test_user_defined_pieces_stay_text_when_they_are_special(legacy: bool) -> None:
    tokenizer = LlamaTokenizer(user_defined("circle"), legacy=legacy, eos_token="circle")
    ids = tokenizer.encode_text("a circle")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode_text(ids) == "a circle"
    assert tokenizer.encode("a circle")[-1] == tokenizer.eos_token_id < NUM_PIECES


def user_defined(piece: str) -> bytes:
    """Train a model that has a piece of the user's own, as Yi's has <|im_end|>."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle and a blue square"] * 9),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=[piece],
        minloglevel=2,
    )
    return model.getvalue()


def test_a_file_of_tokens_takes_no_unknown_form() -> None:
    with pytest.raises(InputError, match="AddedToken"):
        bare(added_tokens={"<a>": "b"})
    with pytest.raises(CheckpointError, match="is taken"):
        bare(added_tokens={NUM_PIECES: AddedToken("<a>"), NUM_PIECES + 1: AddedToken("<a>")})
    with pytest.raises(InputError, match="padding_side"):
        bare(padding_side="up")


def test_batches_compare_by_their_columns() -> None:
    assert Batch({"input_ids": [1]}) == Batch({"input_ids": [1]}) != Batch({"input_ids": [2]})
