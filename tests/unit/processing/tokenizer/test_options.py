"""from_pretrained: what a caller says before the files, what old files mean, and what is written for older readers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from llavakit.errors import InputError
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.tiny import IMAGE_TOKEN, NUM_PIECES, qwen_tokenizer_folder, tiny_tokenizer

Either = type[LlamaTokenizer] | type[LlamaTokenizerFast]
BOTH = pytest.mark.parametrize("kind", [LlamaTokenizer, LlamaTokenizerFast])


@BOTH
def test_what_the_caller_says_comes_before_the_files(tmp_path: Path, kind: Either) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = kind.from_pretrained(
        tmp_path, pad_token="<mask>", add_eos_token=True, padding_side="left", model_max_length=9, use_fast=False, legacy=False
    )
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<mask>", NUM_PIECES + 2)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 9)
    assert tokenizer.encode("a")[-1] == tokenizer.eos_token_id
    assert kind.from_pretrained(tmp_path, pad_token=None).pad_token is None


@BOTH
def test_a_role_may_be_given_to_a_new_token(tmp_path: Path, kind: Either) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = kind.from_pretrained(tmp_path, bos_token=AddedToken("<begin>", special=True), additional_special_tokens=["<more>"])
    assert tokenizer.bos_token_id == NUM_PIECES + 2
    assert tokenizer.encode("a")[0] == NUM_PIECES + 2
    assert tokenizer.additional_special_tokens == ["<more>"]


@BOTH
@pytest.mark.parametrize("options", [{"padding": "left"}, {"vocab_file": "x"}, {"Legacy": True}])
def test_unknown_options_are_refused(tmp_path: Path, kind: Either, options: dict[str, Any]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=next(iter(options))):
        kind.from_pretrained(tmp_path, **options)


@BOTH
@pytest.mark.parametrize("options", [{"add_bos_token": "no"}, {"padding_side": "middle"}])
def test_options_have_the_files_types(tmp_path: Path, kind: Either, options: dict[str, Any]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=next(iter(options))):
        kind.from_pretrained(tmp_path, **options)


@BOTH
def test_a_model_alone_is_enough(tmp_path: Path, kind: Either) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer().files()["tokenizer.model"])
    tokenizer = kind.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert tokenizer.encode("a red circle") == tiny_tokenizer().encode("a red circle")
    tokenizer.add_eos_token = True
    assert tokenizer.encode("a")[-1] == tokenizer.eos_token_id


@BOTH
def test_files_older_than_434_put_the_map_first_and_keep_flags(tmp_path: Path, kind: Either) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer().files()["tokenizer.model"])
    entry = {"content": "<pad>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": entry, "eos_token": "</s>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": NUM_PIECES}))
    tokenizer = kind.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == NUM_PIECES
    assert tokenizer.added_tokens_decoder[NUM_PIECES].lstrip


def test_flags_of_the_fast_tokenizer_outlive_a_change_of_roles() -> None:
    tokenizer = LlamaTokenizerFast(tiny_tokenizer().files()["tokenizer.model"])
    tokenizer.bos_token = "<unk>"
    assert tokenizer.add_bos_token  # the post-processor follows when it is told to
    assert tokenizer.encode("a")[0] == 1
    tokenizer.update_post_processor()
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 0


def test_saved_files_say_which_rule_they_follow(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizerFast(tiny_tokenizer().files()["tokenizer.model"])
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["legacy"] is True
    LlamaTokenizerFast.from_pretrained(qwen_tokenizer_folder(tmp_path / "qwen")).save_pretrained(tmp_path / "again")
    assert "legacy" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text("utf-8"))


@BOTH
def test_merges_are_written_in_the_form_that_every_version_reads(tmp_path: Path, kind: Either) -> None:
    kind(tiny_tokenizer().files()["tokenizer.model"]).save_pretrained(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert merges
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)


@pytest.mark.parametrize(
    ("kind", "text", "spaces"), [(LlamaTokenizer, "<s>red  <a> b c", " "), (LlamaTokenizerFast, "<s> red<a>b c", "  ")]
)
def test_added_tokens_and_spaces_are_decoded_as_in_437(kind: Either, text: str, spaces: str) -> None:
    tokenizer = kind(tiny_tokenizer().files()["tokenizer.model"])
    tokenizer.add_tokens(["<a>", "b c"])
    assert tokenizer.decode([*tokenizer.encode("red <a>"), *tokenizer.encode("b c", add_special_tokens=False)]) == text
    space = tokenizer.convert_tokens_to_ids("▁")
    assert tokenizer.decode([286, space, space]) == spaces


@BOTH
def test_ids_may_be_numpys_and_arguments_by_position(kind: Either, tmp_path: Path) -> None:
    tokenizer = kind(tiny_tokenizer().files()["tokenizer.model"], added_tokens={"<image>": IMAGE_TOKEN})
    ids = np.array(tokenizer.encode("a red circle"))
    assert tokenizer.decode(ids[0]) == "<s>"
    assert tokenizer.convert_ids_to_tokens(ids[0]) == "<s>"
    assert tokenizer.decode(ids, True) == "a red circle"
    assert tokenizer.batch_decode([ids], True) == ["a red circle"]
    assert tokenizer.convert_ids_to_tokens(ids, True) == tokenizer.tokenize("a red circle")
    assert tokenizer.get_special_tokens_mask([1, 5], None, True) == [1, 0]
    assert tokenizer.add_tokens("<x>", True) == 1
    assert tokenizer.save_vocabulary(tmp_path, "") == (str(tmp_path / "tokenizer.model"),)


@pytest.mark.parametrize(("kind", "kept"), [(LlamaTokenizer, [[4, 3], [4, 3]]), (LlamaTokenizerFast, [[3, 4], [4, 3]])])
def test_the_odd_token_goes_where_437_takes_it_from(kind: Either, kept: list[list[int]]) -> None:
    tokenizer = kind(tiny_tokenizer().files()["tokenizer.model"])
    for pair, expected in zip((("red red", "one two three four five"), ("one two three four five", "red red")), kept, strict=True):
        types = tokenizer(*pair, max_length=7, truncation=True, return_token_type_ids=True).token_type_ids
        assert [types.count(0), types.count(1)] == expected


@pytest.mark.parametrize(("padding", "num_kept"), [(False, 3), ("do_not_pad", 6)])
def test_max_length_cuts_only_beside_the_default_padding(padding: Any, num_kept: int) -> None:
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode([*tokenizer.encode("red red red red red", add_special_tokens=False)][:5])
    assert len(tokenizer(text, padding=padding, max_length=3).input_ids) == num_kept
