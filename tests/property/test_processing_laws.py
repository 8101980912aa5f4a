"""Laws of tokenizer, stream and templates over drawn texts and ids."""

import functools
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.stream import Detokenizer, StopMatcher
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.types import Conversation, TextPart
from tests.tiny import NUM_PIECES, llama3_tokenizer_folder, qwen_tokenizer_folder, tiny_processor, tiny_tokenizer

TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" ▁\n<>/s1ae")), max_size=40)
MARKUP = st.sampled_from(["<image>", "</s>", "<s>", "<unk>", "<pad>", "USER:", "ASSISTANT:", " ", "a star"])
IDS = st.lists(st.one_of(st.integers(0, NUM_PIECES + 1), st.integers(3, 258)), max_size=30)
FEW = settings(max_examples=60, deadline=None)


@functools.cache
def tokenizer() -> LlamaTokenizer:
    return tiny_tokenizer()


@functools.cache
def processor() -> LlavaProcessor:
    return tiny_processor()


@functools.cache
def fast_tokenizers() -> tuple[LlamaTokenizerFast, LlamaTokenizerFast, LlamaTokenizerFast]:
    """Load the tiny tokenizers like Llama-2's, Llama-3's and Qwen's."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save_pretrained(Path(folder, "llama2"))
        (Path(folder, "llama2") / "tokenizer.model").unlink()
        folders = (Path(folder, "llama2"), llama3_tokenizer_folder(Path(folder, "llama3")), qwen_tokenizer_folder(Path(folder, "qwen")))
        llama2, llama3, qwen = map(LlamaTokenizerFast.from_pretrained, folders)
        return llama2, llama3, qwen


@FEW
@given(TEXT)
def test_text_survives_its_ids(text: str) -> None:
    ids = tokenizer().encode_text(text)
    assert not tokenizer().special_ids & set(ids)
    assert tokenizer().decode_text(ids) == text.replace("▁", " ")


@FEW
@given(TEXT)
def test_text_survives_byte_level_ids(text: str) -> None:
    for fast, expected in zip(fast_tokenizers()[1:], (text, unicodedata.normalize("NFC", text)), strict=True):
        assert fast.decode_text(fast.encode_text(text)) == expected


@FEW
@given(st.lists(st.one_of(MARKUP, TEXT), max_size=6).map("".join))
def test_no_text_becomes_a_special_token(text: str) -> None:
    for each in (tokenizer(), *fast_tokenizers()):
        assert not {*each.special_ids, *each.added_tokens.values()} & set(each.encode_text(text))


@FEW
@given(TEXT)
def test_slow_and_fast_agree(text: str) -> None:
    assert fast_tokenizers()[0].encode_text(text) == tokenizer().encode_text(text)
    assert fast_tokenizers()[0].encode(text) == tokenizer().encode(text)


@FEW
@given(IDS)
def test_decoding_an_answer_equals_sentencepiece(ids: list[int]) -> None:
    pieces = [index for index in ids if index < NUM_PIECES and index not in tokenizer().special_ids]
    expected = tokenizer().sp_model.decode(pieces)
    assert tokenizer().decode_text(ids) == fast_tokenizers()[0].decode_text(ids) == expected


@FEW
@given(IDS)
def test_decoding_an_answer_equals_the_files_own_decoder(ids: list[int]) -> None:
    for fast in fast_tokenizers()[1:]:
        backend: Backend = fast.backend_tokenizer
        assert fast.decode_text(ids) == backend.decode([index for index in ids if index < len(fast)], skip_special_tokens=True)


@FEW
@given(IDS)
def test_streaming_equals_decoding_at_once(ids: list[int]) -> None:
    for each in (tokenizer(), *fast_tokenizers()):
        assert "".join(streamed(each, ids)) == each.decode_text(ids)


@pytest.mark.catalogue("D10")
@FEW
@given(TEXT.filter(lambda text: "\ufffd" not in text))
def test_streaming_never_shows_half_a_character(text: str) -> None:
    for each in (tokenizer(), *fast_tokenizers()):
        pieces = streamed(each, each.encode_text(text))
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == each.decode_text(each.encode_text(text))


def streamed(each: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(each)
    return [*(detokenizer.push(index) for index in ids), detokenizer.flush()]


@FEW
@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stop_strings_cut_where_they_first_end(pieces: list[str], stops: list[str]) -> None:
    whole, matcher, shown = "".join(pieces), StopMatcher(stops), ""
    for count, piece in enumerate(pieces, 1):
        shown += matcher.push(piece)
        assert "".join(pieces[:count]).startswith(shown)
        assert not any(stop in shown for stop in stops)
    shown += matcher.flush()
    assert matcher.is_stopped == any(stop in whole for stop in stops)
    assert matcher.is_stopped or shown == whole


@pytest.mark.catalogue("D1", "D2", "D3")
@FEW
@given(st.lists(st.lists(MARKUP, min_size=1, max_size=5).map("".join), min_size=1, max_size=5))
def test_typed_markup_never_becomes_structure(texts: list[str]) -> None:
    conversation = Conversation.ask(texts[0])
    for text in texts[1:]:
        conversation = conversation.reply(text, TextPart(text))
    prompt = processor().prompt(conversation)
    specials = [index for index in prompt.ids if index in tokenizer().special_ids]
    assert specials == [tokenizer().bos_token_id] + [tokenizer().eos_token_id] * (len(texts) - 1)
    assert len(prompt.ids) == len(prompt.loss_mask)
