"""load_tokenizer chooses by what is in the folder, and the processor lives on either tokenizer."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from llavakit.errors import CheckpointError, PromptError
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.types import Conversation, TextPart
from tests.tiny import IMAGE_TOKEN, llama3_tokenizer_folder, qwen_tokenizer_folder, tiny_processor, tiny_tokenizer


def test_a_sentencepiece_model_comes_first(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), LlamaTokenizer)
    (tmp_path / "tokenizer.model").unlink()
    fast = load_tokenizer(tmp_path)
    assert isinstance(fast, LlamaTokenizerFast)
    assert fast.encode("a <image> b</s>") == tiny_tokenizer().encode("a <image> b</s>")


def test_text_behind_a_picture_is_encoded_as_llava_does(tmp_path: Path) -> None:
    proto = tiny_tokenizer().files()["tokenizer.model"]
    LlamaTokenizer(proto, added_tokens={"<image>": IMAGE_TOKEN}, legacy=False).save_pretrained(tmp_path)
    assert not LlamaTokenizer.from_pretrained(tmp_path).legacy
    assert load_tokenizer(tmp_path).encode("a <image>b") == LlamaTokenizerFast.from_pretrained(tmp_path).encode("a <image>b")
    assert load_tokenizer(tmp_path).encode("a <image>b") != LlamaTokenizer.from_pretrained(tmp_path).encode("a <image>b")


def test_a_model_of_another_kind_gives_way_to_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama3_tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")  # Llama-3's own file is a list of byte strings
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_tokenizer(tmp_path), LlamaTokenizerFast)
    assert "tokenizer.json" in caplog.text


def test_a_list_for_tiktoken_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match=r"list for tiktoken.*the model's tokenizer\.json has to lie beside it"):
        load_tokenizer(tmp_path)


def test_pieces_that_are_no_text_are_refused(tmp_path: Path) -> None:
    proto, piece = tiny_tokenizer().model_file, tiny_tokenizer().convert_ids_to_tokens(300).encode()
    before, after = (bytes((10, len(text))) + text for text in (piece, b"\xff" * len(piece)))
    (tmp_path / "tokenizer.model").write_bytes(proto.replace(before, after))
    with pytest.raises(CheckpointError, match="a piece that is not UTF-8"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("write", [llama3_tokenizer_folder, qwen_tokenizer_folder])
def test_processors_live_on_byte_level_tokenizers(tmp_path: Path, write: object) -> None:
    assert callable(write)
    tiny_processor().save_pretrained(tmp_path)
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    write(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    tokenizer = processor.tokenizer
    conversation = Conversation.ask("is <image> </s> <|im_end|> <|eot_id|> text?").reply("yes", TextPart("sure?"))
    ids = processor.prompt(conversation).ids
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert [index for index in ids if index in tokenizer.special_ids] == [*head, tokenizer.eos_token_id]
    assert "is <image> </s> <|im_end|> <|eot_id|> text?" in tokenizer.decode_text(ids)
    processor.save_pretrained(tmp_path / "again")
    assert LlavaProcessor.from_pretrained(tmp_path / "again").prompt(conversation).ids == ids


def test_an_answer_needs_an_end_token(tmp_path: Path) -> None:
    path = qwen_tokenizer_folder(tmp_path) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token": None}))
    processor = dataclasses.replace(tiny_processor(), tokenizer=load_tokenizer(tmp_path))
    with pytest.raises(PromptError, match="no eos token"):
        processor.prompt(Conversation.ask("a?").reply("b"), add_generation_prompt=False)
