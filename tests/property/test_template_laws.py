"""Laws of templates over drawn conversations: ids are the original code's, typed markup stays text, what is learned is the answers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.processing.chat import TEMPLATES
from llavakit.processing.segments import encode_segments
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.types import Conversation, TextPart
from tests.originals import CHATML_TOKENS, LLAMA_3_TOKENS, STYLES, original_ids, original_prompt
from tests.tiny import IMAGE_TOKEN, NUM_PIECES, tiny_tokenizer

TOKENS = {token: NUM_PIECES + 2 + place for place, token in enumerate((*CHATML_TOKENS, *LLAMA_3_TOKENS))}
MODEL = tiny_tokenizer().files()["tokenizer.model"]
WITH_BOS, WITHOUT_BOS = (
    LlamaTokenizer(MODEL, added_tokens={"<image>": IMAGE_TOKEN, **TOKENS}, add_bos_token=has_bos) for has_bos in (True, False)
)
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n#:ae1")), min_size=1, max_size=20)
MARKUP = st.lists(st.sampled_from(["<image>", "</s>", "<s>", *TOKENS, "[INST]", "###", " ", "a star"]), min_size=1, max_size=4).map("".join)
MANY = settings(max_examples=150, deadline=None)


def chat_ids(name: str, texts: list[str]) -> tuple[list[int], list[int]]:
    """Encode texts said in turn; returns all ids and the learned ones."""
    template = TEMPLATES[name]
    conversation = Conversation.ask(texts[0])
    for place in range(1, len(texts) - 1, 2):
        conversation = conversation.reply(texts[place], TextPart(texts[place + 1]))
    if len(texts) % 2 == 0:
        conversation = conversation.reply(texts[-1])
    segments = template.segments(conversation, add_generation_prompt=len(texts) % 2 == 1)
    chat = encode_segments(segments, WITH_BOS.encode_text, template.markers(WITH_BOS, IMAGE_TOKEN), [])
    return list(chat.ids), [index for index, counts in zip(chat.ids, chat.loss_mask, strict=True) if counts]


@MANY
@given(st.sampled_from(list(STYLES)), st.lists(TEXT, min_size=1, max_size=5))
def test_ids_are_the_originals(name: str, texts: list[str]) -> None:
    if STYLES[name] == "llama_3":
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            return
    turns = [(texts[place], texts[place + 1] if place + 1 < len(texts) else None) for place in range(0, len(texts), 2)]
    tokenizer = WITH_BOS if TEMPLATES[name].has_bos else WITHOUT_BOS
    assert chat_ids(name, texts)[0] == original_ids(tokenizer, original_prompt(name, turns), IMAGE_TOKEN)


@MANY
@given(st.sampled_from(list(STYLES)), st.lists(MARKUP, min_size=2, max_size=4))
def test_typed_markup_never_becomes_a_special_token(name: str, texts: list[str]) -> None:
    plain = ["x"] * len(texts)
    specials = WITH_BOS.special_ids
    typed, expected = ([index for index in chat_ids(name, said)[0] if index in specials] for said in (texts, plain))
    assert typed == expected
