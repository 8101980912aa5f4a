"""The ids and masks of LLaVA's own training code, for those who want to train as the published weights were.

Owns: exact_chat. The default, ids and mask built together from a template's segments (processing), is right by construction and the same
for ordinary rows. The original searches its own text: it renders a conversation, cuts it at separators, counts the tokens of each piece
encoded alone, and where the counts do not add up it learns nothing of the row. That, and what follows from it, is repeated here: text that
spells a separator or a special token is one, unk is taken for padding, version 0 is written as in training ("### Human: ...", two tokens of
each question learned). Source: llava/train/train.py of LLaVA 1.2.2 (preprocess and its kin), llava/mm_utils.py (tokenizer_image_token).
Refuses: what the original could not read, several pictures and system turns; cutting at 2,048 tokens, which the original does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llavakit.errors import ConfigError
from llavakit.geometry import ImageGrid, num_image_tokens
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.segments import EncodedChat
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.training.checks import FaultError
from llavakit.training.forms import Row

__all__ = ["EXACT_TEMPLATES", "check_exact", "exact_chat"]

_MARKER, _IMAGE = "<image>", -200
_Spans = list[tuple[int, int]]
_Values = Sequence[str]
_Encode = Callable[[str], list[int]]
EXACT_TEMPLATES = ("v0", "llava_v0", "v1", "llava_v1", "llama_2", "llava_llama_2", "mistral_instruct", "mpt", "chatml_direct", "plain")
"""The templates that the original trains with, by our names."""


def check_exact(processor: LlavaProcessor | TextProcessor) -> None:
    """Check that the original has the processor's template. Raises: ConfigError."""
    if processor.template.name not in EXACT_TEMPLATES:
        raise ConfigError(f"masks like the original's exist for the templates {', '.join(EXACT_TEMPLATES)}, got {processor.template.name}")


def exact_chat(processor: LlavaProcessor | TextProcessor, row: Row, grids: Sequence[ImageGrid]) -> EncodedChat:
    """Encode a row as the original does. Raises: FaultError for one that it cannot read."""
    values = _values(row)
    template, tokenizer = processor.template, processor.tokenizer
    system = "" if template.system is None else template.system
    encode = _encoder(tokenizer, splits=bool(row.pictures) or template.name in ("mpt", "chatml_direct"))
    marks = processor.image_marks if isinstance(processor, LlavaProcessor) else None
    if marks is not None:
        values = [value.replace(_MARKER, f"{marks[0]}{_MARKER}{marks[1]}") for value in values]
    match template.name:
        case "plain":
            ids, learned = _captioned(values, row, encode)
        case "v0" | "llava_v0":
            ids, learned = _signalled(system, values, encode)
        case "v1" | "llava_v1":
            ids, learned = _by_rounds(_in_turns(system, values), "</s>", " ASSISTANT: ", encode, tokenizer, is_offset=_is_modern(tokenizer))
        case "mpt" | "chatml_direct":
            ids, learned = _by_ends(system, values, encode, tokenizer)
        case name:
            text = _instructed(system, values, bos="" if name == "mistral_instruct" else "<s>")
            ids, learned = _by_rounds(text, "</s>", "[/INST] ", encode, tokenizer, is_offset=False)
    return _expanded(ids, learned, grids, processor)


def _values(row: Row) -> list[str]:
    """Write the turns as the original has them before it renders: a picture first, outer white space gone beside one."""
    if len(row.pictures) > 1 or any(turn.role == "system" for turn in row.turns):
        raise FaultError("turn", "the original reads neither several pictures nor a system turn; use data.masks=answers")
    if any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(row.turns)):
        raise FaultError("order", "user and assistant must take turns, user first")
    return [f"{_MARKER}\n{turn.text.strip()}".strip() if turn.num_pictures else turn.text for turn in row.turns]


def _encoder(tokenizer: Tokenizer, *, splits: bool) -> _Encode:
    """Encode text as tokenizer_image_token does: stretches between pictures alone, special tokens in the text being themselves.

    Where nothing splits, the text is encoded whole, as the original does for rows without a picture.
    """

    def encode(text: str) -> list[int]:
        if not splits:
            return list(tokenizer(text)["input_ids"])
        chunks = [list(tokenizer(chunk)["input_ids"]) for chunk in text.split(_MARKER)]
        skipped = 1 if chunks[0][:1] == [tokenizer.bos_token_id] else 0
        ids = chunks[0]
        for chunk in chunks[1:]:
            ids = [*ids, _IMAGE, *chunk[skipped:]]
        return ids

    return encode


def _is_modern(tokenizer: Tokenizer) -> bool:
    """Tell whether a stretch that follows a special token begins without the dummy space that it has alone."""
    return isinstance(tokenizer, LlamaTokenizer) and not tokenizer.legacy


def _in_turns(system: str, values: _Values) -> str:
    return f"{system} " + "".join(
        f"{role}: {value}{end}" if value else f"{role}:"
        for value, (role, end) in zip(values, [("USER", " "), ("ASSISTANT", "</s>")] * len(values), strict=False)
    )


def _instructed(system: str, values: _Values, *, bos: str) -> str:
    opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    texts = [f"{opening}{values[0]}", *values[1:]]
    rounds = (f"{bos}[INST] {text} [/INST]" if place % 2 == 0 else f" {text} </s>" for place, text in enumerate(texts) if text)
    return "".join(rounds).lstrip(bos)


def _by_rounds(text: str, end: str, sep: str, encode: _Encode, tokenizer: Tokenizer, *, is_offset: bool) -> tuple[list[int], list[bool]]:
    """Learn what follows sep in each round, by counting tokens of rounds and questions that are encoded alone."""
    ids = encode(text)
    hidden: _Spans = [(0, 1)]
    place = 1
    for number, spoken in enumerate(text.split(end)):
        parts = spoken.split(sep)
        if spoken == "" or len(parts) != 2:
            break
        less = int(number > 0 and is_offset)
        hidden.append((place, place + len(encode(parts[0] + sep)) - 2 - less))
        place += len(encode(spoken)) - less
    return ids, _learned(ids, hidden, place, tokenizer)


def _by_ends(system: str, values: _Values, encode: _Encode, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The same for templates whose turns end alike: the system text belongs to the first round."""
    end, roles = "<|im_end|>", ("<|im_start|>user\n", "<|im_start|>assistant\n")
    text = f"<|im_start|>system\n{system}{end}" + "".join(
        f"{role}{value}{end}" if value else role for value, role in zip(values, roles * len(values), strict=False)
    )
    cut = text.split(end)
    rounds = [end.join(cut[:3]), *(end.join(cut[first : first + 2]) for first in range(3, len(cut), 2))]
    ids = encode(text)
    hidden: _Spans = []
    place = 0
    more = isinstance(tokenizer, LlamaTokenizer) and tokenizer.legacy
    for number, spoken in enumerate(rounds):
        parts = spoken.split(end + roles[1])
        if spoken == "" or len(parts) != 2:
            break
        extra = int(number > 0 and more)
        hidden.append((place, place + len(encode(parts[0] + end + roles[1])) + extra))
        place += len(encode(spoken)) + len(encode(end)) + extra
    return ids, _learned(ids, hidden, place, tokenizer)


def _captioned(values: _Values, row: Row, encode: _Encode) -> tuple[list[int], list[bool]]:
    if len(values) != 2 or row.turns[0].num_pictures != 1:
        raise FaultError("order", "template 'plain' is one picture and its caption; use another to talk")
    ids, num_hidden = encode(f"{_MARKER}{values[1]}\n"), len(encode(_MARKER))
    return ids, [place >= num_hidden for place in range(len(ids))]


def _signalled(system: str, values: _Values, encode: _Encode) -> tuple[list[int], list[bool]]:
    """Version 0: learn everything but the header and each question behind its first two tokens."""
    header = f"{system}\n\n"
    turns = [f"### {('Human', 'Assistant')[place % 2]}: {value}\n" for place, value in enumerate(values)]
    ids = encode(header + "".join(turns) + "### ")
    place = len(encode(header))
    hidden: _Spans = [(0, place)]
    for number, turn in enumerate(turns):
        count = len(encode(turn))
        if number % 2 == 0:
            hidden.append((place + 2, place + count))
        place += count
    return ids, _shown(ids, hidden)


def _learned(ids: list[int], hidden: _Spans, end: int, tokenizer: Tokenizer) -> list[bool]:
    """Learn what is not hidden, up to the end of the last round; nothing where the counts do not add up."""
    num_told = sum(index != tokenizer.find_token("<unk>") for index in ids)
    return [False] * len(ids) if end != num_told else _shown(ids, [*hidden, (end, len(ids))])


def _shown(ids: list[int], hidden: _Spans) -> list[bool]:
    learned = [index != _IMAGE for index in ids]
    for first, last in hidden:
        for place in range(first, min(last, len(ids))):
            learned[place] = False
    return learned


def _expanded(ids: list[int], learned: list[bool], grids: Sequence[ImageGrid], processor: LlavaProcessor | TextProcessor) -> EncodedChat:
    """Give each picture its places. Raises: FaultError where a text spells a picture."""
    image_id = processor.image_token_id if isinstance(processor, LlavaProcessor) else _IMAGE
    if ids.count(_IMAGE) != len(grids) or (image_id in ids and image_id != _IMAGE):
        raise FaultError("marks", f"a text spells {_MARKER}, which the original takes for a picture; use data.masks=answers")
    counts = iter(map(num_image_tokens, grids))
    runs = [
        ((image_id,) * next(counts), False) if index == _IMAGE else ((index,), is_learned)
        for index, is_learned in zip(ids, learned, strict=True)
    ]
    all_ids = tuple(index for run, _ in runs for index in run)
    return EncodedChat(all_ids, tuple(is_learned for run, is_learned in runs for _ in run), ())
