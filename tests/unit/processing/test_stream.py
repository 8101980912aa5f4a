"""Streaming: whole characters, all spaces, no piece of a stop string."""

import pytest

from llavakit.processing.stream import Detokenizer, StopMatcher
from tests.tiny import IMAGE_TOKEN, tiny_tokenizer


def byte_ids(data: bytes) -> list[int]:
    return [3 + byte for byte in data]  # <0x00> is piece 3


def test_characters_come_whole() -> None:
    detokenizer = Detokenizer(tiny_tokenizer())
    assert [detokenizer.push(index) for index in byte_ids("é😀".encode())] == ["", "é", "", "", "", "😀"]
    assert detokenizer.flush() == ""


def test_unfinished_characters_come_at_the_end() -> None:
    detokenizer = Detokenizer(tiny_tokenizer())
    assert [detokenizer.push(index) for index in byte_ids(b"\xf0\x9f")] == ["", ""]
    assert detokenizer.flush() == "\ufffd\ufffd"


def test_a_broken_character_does_not_swallow_the_next() -> None:
    tokenizer = tiny_tokenizer()
    ids = byte_ids(b"\xe2\xe2\xf0\x9f\x98\x80")
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids)) == "\ufffd\ufffd😀" == tokenizer.decode_text(ids)


def test_words_keep_their_spaces() -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(index) for index in tokenizer.encode_text("a red circle  and two")]
    assert "".join(pieces) == "a red circle  and two"
    assert all(pieces)


def test_special_tokens_are_no_text() -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = [tokenizer.bos_token_id, *tokenizer.encode_text("two"), IMAGE_TOKEN, tokenizer.eos_token_id, 10**6]
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "two"


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ((), ["a", "b"], ["a", "b", ""]),
        (("###",), ["a#", "#b", "##", "#c"], ["a", "##b", "", "", ""]),
        (("stop",), ["st", "art"], ["", "start", ""]),
        (("stop",), ["a st"], ["a ", "st"]),
        (("bc", "abcd"), ["ab", "c", "d"], ["", "a", "", ""]),
        (("\n\n", "\nUSER"), ["hi\n", "USE", "R:"], ["hi", "", "", ""]),
    ],
)
def test_stop_strings_are_never_shown(stops: tuple[str, ...], pieces: list[str], shown: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert [*(matcher.push(piece) for piece in pieces), matcher.flush()] == shown
