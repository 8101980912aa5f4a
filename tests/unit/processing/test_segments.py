"""Segments: ids and mask are those of the whole text, whatever the tokenizer's ways with spaces and borders."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llavakit.errors import CheckpointError, PromptError
from llavakit.processing.chat import TEMPLATES
from llavakit.processing.segments import ChatTokenizer, MarkerIds, Segment, encode_segments, find_marker, segments_text
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.types import Conversation, ImagePart, Message, TextPart
from tests.originals import CHATML_TOKENS, LLAMA_3_TOKENS, STYLES, original_ids, original_prompt
from tests.real_data import llama2_tokenizer
from tests.tiny import IMAGE_TOKEN, NUM_PIECES, llama3_tokenizer_folder, qwen_tokenizer_folder, tiny_tokenizer

PLACE = ImagePart(b"never opened")
TALK = Conversation((Message("user", (PLACE, TextPart("a red circle?"))),)).reply("yes,  2 of them\n", TextPart("and # now")).reply("no #")
TURNS = [("<image>\na red circle?", "yes,  2 of them\n"), ("and # now", "no #")]
MARKERS = MarkerIds(-1, 1, 2, {}, has_opening=True)


@dataclass
class WordTokenizer:
    """Words with the space before them, as byte-level tokenizers cut; nothing is put in front, and there is no bos."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 0
    words: list[str] = field(default_factory=lambda: ["</s>", *CHATML_TOKENS, *LLAMA_3_TOKENS])

    def encode_text(self, text: str) -> list[int]:
        return [self.find(word) for word in re.findall(r" ?\w+|\s+|[^\w\s]+", text)]

    def find(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def find_token(self, token: str) -> int | None:
        return self.words.index(token) if token in self.words else None


def encoded(name: str, conversation: Conversation, tokenizer: ChatTokenizer, image_id: int) -> tuple[list[int], list[int]]:
    """Encode with one slot for each picture; returns the ids and those that are learned."""
    template = TEMPLATES[name]
    segments = template.segments(conversation, add_generation_prompt=conversation.messages[-1].role == "user")
    chat = encode_segments(segments, tokenizer.encode_text, template.markers(tokenizer, image_id), [1] * len(conversation.images))
    assert sum(chat.lengths) == len(chat.ids) - (chat.ids[:1] == (tokenizer.bos_token_id,))
    return list(chat.ids), [index for index, counts in zip(chat.ids, chat.loss_mask, strict=True) if counts]


def tiny_with(name: str) -> LlamaTokenizer:
    """Make the tiny tokenizer with the markers that a template needs, and bos only where the template has it."""
    names = {"mpt": CHATML_TOKENS, "chatml": CHATML_TOKENS, "llama_3": LLAMA_3_TOKENS}.get(STYLES[name], ())
    added = {token: NUM_PIECES + 2 + place for place, token in enumerate(names)}
    model = tiny_tokenizer().files()["tokenizer.model"]
    return LlamaTokenizer(model, added_tokens={"<image>": IMAGE_TOKEN, **added}, add_bos_token=TEMPLATES[name].has_bos)


def stripped(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(question.strip(), answer.strip()) for question, answer in turns]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_equal_the_originals(name: str, system: str | None) -> None:
    tokenizer = tiny_with(name)
    head = () if system is None else (Message("system", (TextPart(system),)),)
    turns = stripped(TURNS) if STYLES[name] == "llama_3" else TURNS
    expected = original_ids(tokenizer, original_prompt(name, turns, system=system), IMAGE_TOKEN)
    assert encoded(name, Conversation((*head, *TALK.messages)), tokenizer, IMAGE_TOKEN)[0] == expected


@pytest.mark.parametrize("name", STYLES)
def test_prompts_that_ask_equal_the_originals(name: str) -> None:
    tokenizer = tiny_with(name)
    conversation = Conversation((*TALK.messages, Message("user", (TextPart("why?"),))))
    turns = stripped(TURNS) if STYLES[name] == "llama_3" else TURNS
    expected = original_ids(tokenizer, original_prompt(name, [*turns, ("why?", None)]), IMAGE_TOKEN)
    assert encoded(name, conversation, tokenizer, IMAGE_TOKEN)[0] == expected


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style in ("two", "single", "llama_2", "mistral")])
def test_ids_equal_the_originals_with_the_real_tokenizer(name: str) -> None:
    tokenizer = llama2_tokenizer()
    expected = original_ids(tokenizer, original_prompt(name, TURNS), 32000)
    assert encoded(name, TALK, tokenizer, 32000)[0] == expected


def test_the_known_ids_of_llava_come_out() -> None:
    # Source: ids published with LLaVA-1.5-7B for this question; -200 is its mark for the picture.
    conversation = Conversation.ask("Please describe this image in detail.", PLACE.data)
    ids, _ = encoded("v1", conversation, llama2_tokenizer(), -200)
    assert ids[:3] == [1, 319, 13563]
    assert ids[-19:] == [
        3148, 1001, 29901, 29871, -200, 29871, 13, 12148, 8453, 445, 1967, 297, 9493, 29889, 319, 1799, 9047, 13566, 29901
    ]  # fmt: skip
    assert len(ids) == 50


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style in ("chatml", "llama_3", "mpt")])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_byte_level_ids_equal_transformers(tmp_path: Path, name: str, system: str | None) -> None:
    folder = (llama3_tokenizer_folder if STYLES[name] == "llama_3" else qwen_tokenizer_folder)(tmp_path)
    tokenizer, oracle = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    head = () if system is None else (Message("system", (TextPart(system),)),)
    image_id = tokenizer.find_token("<image>")
    assert image_id is not None
    turns = stripped(TURNS) if STYLES[name] == "llama_3" else TURNS
    # <image> is a token of these vocabularies, so the text can be tokenised at once, as LLaVA-NeXT's training does.
    expected = oracle(original_prompt(name, turns, system=system))["input_ids"]
    assert encoded(name, Conversation((*head, *TALK.messages)), tokenizer, image_id)[0] == expected


@pytest.mark.parametrize("name", STYLES)
def test_ids_without_a_dummy_space_are_those_of_the_whole_text(name: str) -> None:
    tokenizer = WordTokenizer()
    special = re.compile(r"(<image>|</s>|<s>|<\|\w+\|>)")
    turns = stripped(TURNS) if STYLES[name] == "llama_3" else TURNS
    conversation = Conversation((TALK.messages[0], TALK.messages[1]))
    parts = special.split(original_prompt(name, turns[:1]))
    expected = [
        index
        for part in parts
        for index in (
            [-1] if part == "<image>" else [tokenizer.words.index(part)] if special.fullmatch(part) else tokenizer.encode_text(part)
        )
    ]
    assert encoded(name, conversation, tokenizer, -1)[0] == expected


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style != "llama_2"])
def test_answers_and_their_terminators_are_learned(name: str) -> None:
    tokenizer = WordTokenizer()
    _, learned = encoded(name, Conversation.ask("what is it").reply("a star", TextPart("sure")).reply("yes"), tokenizer, -1)
    lead, end = {"two": (" ", "</s>"), "mistral": (" ", " </s>"), "single": (" ", "###"), "llama_3": ("", "<|eot_id|>")}.get(
        STYLES[name], ("", "<|im_end|>")
    )
    assert "".join(tokenizer.words[index] for index in learned) == f"{lead}a star{end}{lead}yes{end}"


def test_llama_2_learns_the_space_before_its_end() -> None:
    # preprocess_llama_2 masks up to "[/INST] " less that space, and the bos of the next turn.
    tokenizer = tiny_tokenizer()
    _, learned = encoded("llama_2", Conversation.ask("what").reply("a star", TextPart("sure")).reply("yes"), tokenizer, IMAGE_TOKEN)
    assert learned == [*tokenizer.encode_text("a star "), 2, *tokenizer.encode_text("yes "), 2]


def test_a_token_over_the_border_belongs_to_the_later_text() -> None:
    tokenizer = WordTokenizer()
    segments = [Segment("text", "why?"), Segment("text", "! yes", True)]
    chat = encode_segments(segments, tokenizer.encode_text, MARKERS, [])
    assert [tokenizer.words[index] for index in chat.ids[1:]] == ["why", "?!", " yes"]
    assert chat.loss_mask == (False, False, True, True)
    assert chat.lengths == (1, 2)


def test_no_tokens_are_lost_where_a_text_ends_in_spaces() -> None:
    tokenizer = tiny_tokenizer()
    segments = [Segment("text", "a  "), Segment("text", " b", True), Segment("text", " ")]
    assert list(encode_segments(segments, tokenizer.encode_text, MARKERS, []).ids[1:]) == tokenizer.encode_text("a   b ")


def test_pictures_take_their_slots_in_order() -> None:
    segments = [Segment("image"), Segment("eos", "", True), Segment("image")]
    chat = encode_segments(segments, tiny_tokenizer().encode_text, MARKERS, (2, 3))
    assert chat.ids == (1, -1, -1, 2, -1, -1, -1)
    assert chat.lengths == (2, 1, 3)
    assert chat.loss_mask == (False, False, False, True, False, False, False)


def test_a_missing_token_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"'qwen' needs the token '<\|im_start\|>'"):
        TEMPLATES["qwen"].markers(tiny_tokenizer(), IMAGE_TOKEN)
    with pytest.raises(CheckpointError, match="'v9'"):
        find_marker(tiny_tokenizer(), "no such token", "v9")


def test_a_tokenizer_without_eos_cannot_end_answers() -> None:
    markers = TEMPLATES["v1"].markers(WordTokenizer(eos_token_id=None), -1)
    with pytest.raises(PromptError, match="no eos token"):
        encode_segments([Segment("eos")], str.encode, markers, [])


def test_segments_are_spelled_out() -> None:
    segments = [Segment("bos"), Segment("image"), Segment("text", "\nhi"), Segment("token", "<|eot_id|>"), Segment("eos")]
    assert segments_text(segments, eos="END") == "<s><image>\nhi<|eot_id|>END"
