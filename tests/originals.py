"""What LLaVA's own code made of a conversation: prompt strings written out by style, and their ids chunk by chunk.

An oracle for templates, independent of the package's: shapes are those of get_prompt, ids those of tokenizer_image_token over the
slow legacy tokenizer (facts: split at <image>, each chunk with bos, later bos dropped).
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.processing.chat import TEMPLATES
from llavakit.processing.tokenizer.slow import LlamaTokenizer

__all__ = ["CHATML_TOKENS", "LLAMA_3_TOKENS", "STYLES", "Turn", "original_ids", "original_prompt"]

Turn = tuple[str, str | None]
"""A question and its answer; None asks for one."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
STYLES = {
    "v1": "two", "v1_hf": "two", "llava_v1": "two", "llava_v0": "single",
    "llama_2": "llama_2", "llama_2_chat": "llama_2", "llava_llama_2": "llama_2", "mistral_instruct": "mistral",
    "mpt": "mpt", "chatml_direct": "mpt", "chatml_direct_hf": "mpt", "qwen": "chatml", "qwen_2_5": "chatml", "chatml": "chatml",
    "llava_llama_3": "llama_3", "llama_3": "llama_3",
}  # fmt: skip


def original_prompt(name: str, turns: Sequence[Turn], *, system: str | None = None) -> str:
    """Write a conversation in the style of a template; its system line unless another is given."""
    system = TEMPLATES[name].system if system is None else system
    match STYLES[name]:
        case "two":
            text = "" if system is None else f"{system} "
            return text + "".join(f"USER: {q} ASSISTANT:{_unless_none(' ', a, '</s>')}" for q, a in turns)
        case "single":
            return f"{system}###" + "".join(f"Human: {q}###Assistant:{_unless_none(' ', a, '###')}" for q, a in turns)
        case "llama_2" | "mistral" as style:
            head = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
            rounds = [f"[INST] {head if i == 0 else ''}{q} [/INST]{_unless_none(' ', a, ' </s>')}" for i, (q, a) in enumerate(turns)]
            return ("<s>" if style == "llama_2" else "").join(rounds)
        case "mpt" | "chatml" as style:
            end = "<|im_end|>" if style == "mpt" else "<|im_end|>\n"
            text = "" if system is None else f"<|im_start|>system\n{system}{end}"
            return text + "".join(f"<|im_start|>user\n{q}{end}<|im_start|>assistant\n{_unless_none('', a, end)}" for q, a in turns)
    text = "" if system is None else _header("system") + f"{system}<|eot_id|>"
    return text + "".join(f"{_header('user')}{q}<|eot_id|>{_header('assistant')}{_unless_none('', a, '<|eot_id|>')}" for q, a in turns)


def original_ids(tokenizer: LlamaTokenizer, prompt: str, image_id: int) -> list[int]:
    """Tokenise a prompt as tokenizer_image_token does; image_id stands once for each picture."""
    chunks = [tokenizer.encode(chunk) for chunk in prompt.split("<image>")]
    offset = 1 if tokenizer.add_bos_token else 0
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, image_id, *chunk[offset:]]
    return ids


def _unless_none(lead: str, answer: str | None, end: str) -> str:
    return "" if answer is None else lead + answer + end


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
