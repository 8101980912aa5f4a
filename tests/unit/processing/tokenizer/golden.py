"""What a tokenizer does with many texts, ids and calls, written down as digests.

record() runs on transformers' tokenizers and on ours, so that the recorded files and the tests cannot drift apart. The files were
written by `python tests/unit/processing/tokenizer/golden.py MODEL NAME`, with transformers 4.37.2, tokenizers 0.15.2, sentencepiece
and protobuf in an environment of its own (PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python).
"""

import json
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

KINDS = ("legacy", "plain", "fast", "legacy_eos", "fast_eos")
"""The recorded tokenizers: slow with and without legacy, fast; the last two add eos, and plain tokens beside the special ones."""
_MARKS = ("<s>", "</s>", "<unk>", "<image>", "<pad>", "<tool>")
_WORDS = ("the", "Red", "circle", "of", "3", "2026", "left", "USER:", "naïve", "it's", "don't", "Straße", "e.g.", "<0x20>", "</", "<s")
_FIXED = (
    "", " ", "  ", "   ", "\u2581", "\u2581\u2581a", "Hello", " Hello", "  Hello", "Hello ", "Hello  world", "a    b", " " * 20 + "end",
    "\n", "\n\n", " \n ", "\t", "tab\tx", "a\r\nb", "naïve café", "e\u0301", "日本語", "한국어 문장", "العربية", "हिन्दी", "ẹ̀rọ",
    "a\u00a0b", "a\u200bb",
    "😀", "👩‍👩‍👧", "🇩🇪 x", "\x00", "\x01\x02", "\x7f", "\ufeffx", "\ufffd", "\U0010ffff", "1234567", "3.14159", "-1e9", "x=1;y=2",
    "def f(x):\n    return x + 1\n", "https://a.b/c?d=e&f", "<0x0A>", "<0x41>", "<", ">", "<s", "s>", "</", "<<s>>", "< s >", "<S>", "</S>",
    "<image", "<image>image>", "<s></s>", "<s> </s>", "</s></s>", "a</s>b", "a </s> b", "Hello</s> hi", "<s>x", "<s> x", " <s>x",
    "\u2581<s>x",
    "x<image>y", "<image>", "<image>\nWhat?", "USER: <image>\nWhat is it? ASSISTANT:", "A</s>USER: B ASSISTANT:", "<pad><pad>a", "<unk>a",
    "a<unk>", "<tool>a", "a <tool> b", "<tool><image>", " can't do n't . ? ! , ' s 's 've", "⁇", " ⁇ ", "a ⁇ b",
)  # fmt: skip


def texts() -> list[str]:
    """Return the fixed texts and some that are drawn."""
    return [*_FIXED, *drawn_texts(0, 420 - len(_FIXED), with_marks=True)]


def drawn_texts(seed: int, count: int, *, with_marks: bool) -> Iterator[str]:
    """Draw texts of words, runs of white space, digits, controls, scripts, emoji and, if asked for, special tokens."""
    rng = random.Random(seed)
    ranges = ((32, 126), (0, 32), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0x2000, 0x206F))
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 9)):
            match rng.randrange(7 if with_marks else 6):
                case 0 | 1:
                    parts.append(rng.choice(_WORDS) + rng.choice(("", " ", " ", ", ")))
                case 2:
                    parts.append(rng.choice((" ", "\n", "\t", "\u2581", "\u3000")) * rng.randint(1, 6))
                case 3:
                    parts.append(str(rng.randrange(10 ** rng.randint(1, 12))))
                case 4 | 5:
                    low, high = rng.choice(ranges)
                    parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
                case _:
                    parts.append(rng.choice(_MARKS))
        yield "".join(parts)


def id_lists(num_pieces: int) -> list[list[int]]:
    """Draw ids of pieces, of bytes (whole characters and broken ones), and of special and added tokens."""
    rng = random.Random(1)
    data = "é€😀日".encode()
    lists = [[], [0], [1], [2], [1, 2], [3], [35], [3 + 198, 3 + 43], [3 + 0xE2, 3 + 0xE2, 3 + 0x98], [*range(259, 269)]]
    while len(lists) < 200:
        ids: list[int] = []
        for _ in range(rng.randint(1, 6)):
            start = rng.randrange(len(data))
            choices = (
                [rng.randrange(259, num_pieces) for _ in range(rng.randint(1, 3))],
                [3 + byte for byte in data[start : start + rng.randint(1, 6)]],
                [3 + rng.randrange(256)],
                [rng.choice((0, 1, 2, *range(num_pieces, num_pieces + 3)))],
            )
            ids += rng.choice(choices)
        lists.append(ids)
    return lists


_LONG, _SHORT = "How many red circles are left of the blue square?", "Two."
_CALLS: tuple[dict[str, Any], ...] = (
    {"text": _LONG, "return_token_type_ids": True, "return_special_tokens_mask": True},
    {"text": [_LONG, _SHORT], "padding": True, "return_special_tokens_mask": True},
    {"text": [_LONG, _SHORT], "padding": "longest", "pad_to_multiple_of": 8},
    {"text": [_LONG, _SHORT], "padding": "max_length", "max_length": 60},
    {"text": [_LONG, _SHORT], "padding": "max_length", "max_length": 8, "truncation": True},
    {"text": [_LONG, _SHORT], "padding": "max_length", "max_length": 9, "pad_to_multiple_of": 4},
    {"text": _SHORT, "padding": "max_length", "max_length": 12},
    {"text": _LONG, "max_length": 5},
    {"text": _LONG, "max_length": 5, "truncation": "only_first", "add_special_tokens": False},
    {"text": _LONG, "max_length": 5, "truncation": False},
    {"text": [_LONG, _SHORT], "max_length": 5, "padding": True},
    {"text": _LONG, "text_pair": _SHORT, "return_token_type_ids": True, "return_special_tokens_mask": True},
    {"text": _LONG, "text_pair": _LONG, "max_length": 20, "truncation": True, "return_token_type_ids": True},
    {"text": _LONG, "text_pair": _SHORT, "max_length": 12, "truncation": "only_first"},
    {"text": _SHORT, "text_pair": _LONG, "max_length": 14, "truncation": "only_second"},
    {"text": [_LONG, _SHORT], "text_pair": [_SHORT, _LONG], "padding": True, "return_token_type_ids": True},
    {"text": [_LONG, _SHORT], "text_pair": [_SHORT, _LONG], "max_length": 16, "truncation": True, "return_attention_mask": False},
    {"text": _LONG, "add_special_tokens": False},
)


def record(tokenizer: Any) -> dict[str, Any]:
    """Return digests of all that a tokenizer does; equal digests mean equal results."""
    encoded = [tokenizer.encode(text) for text in texts()]
    return {
        "encode": [digest(ids) for ids in encoded],
        "tokenize": [digest(tokenizer.tokenize(text)) for text in texts()],
        "decode": [digest([tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]) for ids in encoded],
        "ids": [digest(tokenizer.decode(ids)) for ids in id_lists(tokenizer.vocab_size)],
        "apart": [digest(tokenizer.decode(ids, spaces_between_special_tokens=False)) for ids in id_lists(tokenizer.vocab_size)],
        "clean": [digest(tokenizer.decode(ids, clean_up_tokenization_spaces=True)) for ids in encoded],
        "calls": [digest(dict(sorted(tokenizer(**call).items()))) for call in _CALLS],
        "left": digest(_from_the_left(tokenizer)),
        "facts": _facts(tokenizer),
    }


def _from_the_left(tokenizer: Any) -> list[Any]:
    sides = tokenizer.padding_side, tokenizer.truncation_side
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    results = [dict(sorted(tokenizer(**call).items())) for call in _CALLS]
    tokenizer.padding_side, tokenizer.truncation_side = sides
    return results


def _facts(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.encode("a <image> b</s>")
    return {
        "len": len(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "vocab": digest(sorted(tokenizer.get_vocab().items())),
        "roles": [[getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id")] for role in ("bos", "eos", "unk", "pad")],
        "added": tokenizer.get_added_vocab(),
        "inputs": [tokenizer.build_inputs_with_special_tokens([5, 6]), tokenizer.build_inputs_with_special_tokens([5, 6], [7])],
        "num_special": [tokenizer.num_special_tokens_to_add(pair=False), tokenizer.num_special_tokens_to_add(pair=True)],
        "mask": tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True),
        "pieces": tokenizer.convert_ids_to_tokens(ids),
        "texts": tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True),
        "back": [tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)), tokenizer.convert_tokens_to_ids("no such token")],
        "string": tokenizer.convert_tokens_to_string(tokenizer.tokenize("a red </s> circle")),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }


def add_tokens(tokenizer: Any, kind: str) -> Any:
    """Add what the recorded tokenizers have: <image> and <pad>, for some a plain token too; returns the tokenizer."""
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    is_plain = kind.endswith("_eos")
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=not is_plain)], special_tokens=not is_plain)
    if is_plain:
        tokenizer.add_eos_token = True
    return tokenizer


def digest(value: Any) -> str:
    """Return eight hexadecimal digits that stand for a value."""
    return f"{zlib.crc32(json.dumps(value, ensure_ascii=True).encode()):08x}"


def _write(model: str, name: str) -> None:
    from transformers import LlamaTokenizer, LlamaTokenizerFast

    records = {}
    for kind in KINDS:
        made = LlamaTokenizerFast(vocab_file=model) if "fast" in kind else LlamaTokenizer(model, legacy=kind != "plain")
        records[kind] = record(add_tokens(made, kind))
    path = Path(__file__).parent / f"{name}_437.json"
    path.write_text(json.dumps(records, separators=(",", ":"), ensure_ascii=False).replace('],"', '],\n"') + "\n", "utf-8")


if __name__ == "__main__":
    _write(*sys.argv[1:])
