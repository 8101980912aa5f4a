"""Chat templates as other projects' checkpoints carry them, shortened to their form: each shows known deviations."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FILES", "TEXT_FILES", "File"]

_IMAGES = "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ IMAGE }}{% endfor %}"
_TEXTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ TEXT }}{% endfor %}"


@dataclass(frozen=True)
class File:
    """A template's text, the template of ours that it means, and the deviations that it has."""

    text: str
    template: str
    deviations: tuple[str, ...] = ()
    is_vision: bool = True


def _parts(image: str, text: str) -> str:
    return _IMAGES.replace("IMAGE", image) + _TEXTS.replace("TEXT", text)


FILES = {
    "llava-hf 1.5": File(
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        + _IMAGES.replace("IMAGE", "'<image>\\n'")
        + "{% if message['role'] != 'assistant' %}"
        + _TEXTS.replace("TEXT", "part['text'] + ' '")
        + "{% else %}"
        + _TEXTS.replace("{{ TEXT }}", "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "v1_hf",
        ("missing-system-line", "missing-end-token", "extra-space"),
    ),
    "newline form": File(
        "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
        + _parts("'<image>\\n'", "part['text']")
        + "{{ '\\n' }}{% elif message['role'] == 'assistant' %}ASSISTANT: "
        + _parts("''", "part['text']")
        + "{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "v1_hf",
        ("missing-system-line", "newline-before-assistant", "missing-end-token", "extra-space"),
    ),
    "in order, double bos, trailing space": File(
        "{{ bos_token + 'A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the human\\'s questions. ' }}{% for message in messages %}{{ message['role'] | upper + ': ' }}"
        "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        "llava_v1",
        ("image-after-text", "double-bos", "other-system-line", "no-newline-after-image", "trailing-space"),
    ),
    "llava-hf 1.6 mistral": File(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\\n' + message['content'][0]['text'] + "
        "'\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        + _parts("'<image>\\n'", "part['text']")
        + "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] + '<\\\\s> ' }}{% endif %}{% endfor %}",
        "mistral_instruct",
        ("missing-end-token", "other-markup"),
    ),
    "llava-hf 1.6 34b": File(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + _parts("'<image>\\n'", "part['text']")
        + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "chatml_direct_hf",
        ("missing-system-line",),
    ),
    "llava-hf interleave": File(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        + _parts("'<image>'", "'\\n' + part['text']")
        + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "chatml",
        ("missing-system-line", "space-after-role", "missing-newline"),
    ),
    "llava-hf llama 3": File(
        "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        + _parts("'<image>'", "'\\n' + part['text'] + '<|eot_id|>'")
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "llama_3",
        ("missing-system-line", "extra-space"),
    ),
    "Qwen2": File(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "qwen",
        is_vision=False,
    ),
    "Llama-2-chat": File(
        "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
        "{% if loop.index0 == 0 and system_message is defined %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
        "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "llama_2_chat",
        is_vision=False,
    ),
    "Mistral instruct": File(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
        "mistral_instruct",
        ("missing-space", "moved-space"),
        is_vision=False,
    ),
    "Llama 3 instruct": File(
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "llama_3",
        is_vision=False,
    ),
    "LLaVA v0": File(
        "{{ 'A chat between a curious human and an artificial intelligence assistant.###' }}{% for message in messages %}"
        "{{ 'Human: ' if message['role'] == 'user' else 'Assistant: ' }}"
        + _parts("'<image>\\n'", "part['text']")
        + "{{ '###' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "llava_v0",
        ("other-system-line",),
    ),
}

_HEADED = "{% if messages[0].role == 'system' %}{{ SYSTEM }}{% set messages = messages[1:] %}{% else %}{{ DEFAULT }}{% endif %}"
_FORMS = {
    "one form for all": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "system inside, stripped": "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>' + messages[0].content + '<</SYS>> ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "no system": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ raise_exception('no system text') }}{% endif %}{% endfor %}",
    "default system line": _HEADED.replace("SYSTEM", "messages[0].content + ' '").replace("DEFAULT", "'Talk nicely. '")
    + "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "answers end in words": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}{% elif m.role == 'user' %}"
    "{{ '### Q:\\n' + m.content + '\\n' }}{% else %}{{ '### A:\\n' + m.content + '\\n### END\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### A:\\n' }}{% endif %}",
    "ChatML": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "a date, trimmed": "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + (date or 'unknown') + '\\n\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
}
TEXT_FILES = {**_FORMS, **{name: file.text for name, file in FILES.items() if not file.is_vision}}
"""Files of language models alone."""
