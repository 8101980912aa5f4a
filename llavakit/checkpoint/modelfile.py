"""Ollama's Modelfile: which files a model consists of, and its conversation template in Go's template syntax.

Ollama fills {{ .System }}, {{ .Prompt }} and {{ .Response }} once for each turn, and stops at the response of the last one.
Pictures it puts before the prompt, without the line break of LLaVA's training; nothing in a template can change that.
Source: docs/modelfile.mdx and template/template.go of Ollama.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.errors import ConfigError
from llavakit.processing.chat import ChatTemplate, Turns
from llavakit.processing.tokenizer.vocabulary import Tokenizer

__all__ = ["MODELFILE_NAME", "modelfile"]

MODELFILE_NAME = "Modelfile"


def modelfile(files: Sequence[str], template: ChatTemplate | None, tokenizer: Tokenizer) -> str:
    """Write a Modelfile for files beside it; without a template the text goes in as it is.

    Raises: ConfigError for a system text that no Modelfile can hold.
    """
    lines = [f"FROM ./{name}" for name in files]
    turns = None if template is None or not isinstance(template.form, Turns) else template.form
    lines.append(f'TEMPLATE """{"{{ .Prompt }}" if turns is None else _go_template(turns, tokenizer)}"""')
    if template is not None and template.system is not None and turns is not None:
        if '"""' in template.system:
            raise ConfigError('the system text of the template holds """, which a Modelfile cannot')
        lines.append(f'SYSTEM """{template.system}"""')
    return "\n".join([*lines, *(_stop(text) for text in _stops(template, tokenizer))]) + "\n"


def _go_template(turns: Turns, tokenizer: Tokenizer) -> str:
    before, after = (_go_text(turns, part, tokenizer) for part in turns.system or ("", ""))
    system = "" if turns.system is None else f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}"
    user, user_end, opening, lead, end = (
        _go_text(turns, part, tokenizer) for part in (*turns.user, turns.opening, turns.lead, turns.end + turns.between)
    )
    start = user + system if turns.is_system_inside else system + user
    return f"{start}{{{{ .Prompt }}}}{user_end}{opening}{{{{ if .Response }}}}{lead}{{{{ .Response }}}}{end}{{{{ end }}}}"


def _go_text(turns: Turns, markup: str, tokenizer: Tokenizer) -> str:
    """Write markup so that Go shows it; tokens are spelled as the tokenizer spells them."""
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    text = ""
    for segment in turns.cut(markup):
        index = ids.get(segment.kind)
        text += segment.text if index is None else tokenizer.convert_ids_to_tokens(index)
    for mark in ("{{", '"""'):
        text = text.replace(mark, "{{ `" + mark[:2] + "` }}" + mark[2:])
    return text


def _stops(template: ChatTemplate | None, tokenizer: Tokenizer) -> tuple[str, ...]:
    end = tokenizer.eos_token_id
    own = () if template is None else (*template.end_tokens, *template.stops)
    return tuple(dict.fromkeys((*(() if end is None else (tokenizer.convert_ids_to_tokens(end),)), *own)))


def _stop(text: str) -> str:
    quote = '"""' if "\n" in text or '"' in text else '"'
    return f"PARAMETER stop {quote}{text}{quote}"
