"""Laws of tokenizer, stream and templates over drawn texts and ids."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.stream import Detokenizer, StopMatcher
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.types import Conversation, TextPart
from tests.tiny import NUM_PIECES, tiny_processor, tiny_tokenizer

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


@FEW
@given(TEXT)
def test_text_survives_its_ids(text: str) -> None:
    ids = tokenizer().encode_text(text)
    assert not tokenizer().special_ids & set(ids)
    assert tokenizer().decode_text(ids) == text.replace("▁", " ")


@FEW
@given(IDS)
def test_streaming_equals_decoding_at_once(ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer())
    pieces = [detokenizer.push(index) for index in ids]
    assert "".join((*pieces, detokenizer.flush())) == tokenizer().decode_text(ids)


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
