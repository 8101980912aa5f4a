"""GGUF files with one wrong value: a model that answers, or one of our errors. Every 20th case always, all of them in the soak."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from llavakit import LLM, Conversation, LlavaLlamaForCausalLM, SamplingParams
from llavakit.errors import CheckpointError, PromptError
from llavakit.storage.gguf_file import GgufFile
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.gguf_files import write_text, write_tower
from tests.tiny import family_config, scale_weights

PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 70, 30))
NAN, INFINITE = float("nan"), float("inf")
WRONG: tuple[tuple[str, Any], ...] = (
    *(("UINT32", number) for number in (0, 1, 3, 2**32 - 1)), ("INT32", -1), ("UINT64", 2**63),
    *(("FLOAT32", number) for number in (0.0, NAN, INFINITE, -1.0, 1e38)),
    ("STRING", "nonsense"), ("STRING", "{% for x in"), ("BOOL", True),
    *(("ARRAY", items) for items in ([1, 2], [-1] * 6, ["a"], [NAN] * 3, [0.0] * 3, [2**31 - 1] * 2)), ("absent", None),
)  # fmt: skip
MORE = {
    "llama.attention.key_length": 16, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0,
    "tokenizer.chat_template": "[INST]", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": True,
    "llavakit.template": "v1", "general.alignment": 32, "split.count": 1, "split.no": 0,
}  # fmt: skip


class WrongWriter(gguf.GGUFWriter):
    """The library's writer, which spoils one value at the end."""

    key, kind, value = "", "absent", None

    def write_header_to_file(self, path: Path | None = None) -> None:
        found = self.kv_data[0].pop(self.key, None)
        if found is not None and self.kind != "absent":
            self.kv_data[0][self.key] = type(found)(self.value, gguf.GGUFValueType[self.kind])
        super().write_header_to_file(path)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    monkeypatch.setattr(gguf, "GGUFWriter", WrongWriter)
    model = scale_weights(LlavaLlamaForCausalLM(family_config("1.6-vicuna")))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    text = {name.removeprefix("language_model."): weight for name, weight in weights.items() if name.startswith("language_model.")}
    tower = {name: weight for name, weight in weights.items() if not name.startswith("language_model.")}

    def written() -> Path:
        write_text(tmp_path / "a.gguf", model.config.text_config, text, values=MORE)
        write_tower(tmp_path / "b.gguf", model.config, tower, is_legacy=False)
        return tmp_path

    return written


def answers_or_fails(write: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, step: int) -> tuple[int, int]:
    """Try every step-th wrong value of every key; count answers and errors."""
    folder = write()
    keys = []
    for path in sorted(folder.iterdir()):
        file = GgufFile(path)
        file.close()
        keys += list(file.metadata)
    num_answers = num_errors = 0
    for key, (kind, value) in [(key, wrong) for key in keys for wrong in WRONG][::step]:
        for name, changed in (("key", key), ("kind", kind), ("value", value)):
            monkeypatch.setattr(WrongWriter, name, changed)
        try:
            write()
        except (TypeError, ValueError, AttributeError):  # not even the library can write it
            continue
        try:
            LLM(folder, dtype="float32").chat(Conversation.ask("what is there?", PICTURE), SamplingParams(max_tokens=1))
            num_answers += 1
        except (CheckpointError, PromptError):
            num_errors += 1
    return num_answers, num_errors


@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.soak)])
def test_wrong_values_are_errors_or_do_not_matter(write: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(logging.getLogger("llavakit"), "disabled", True)
    num_answers, num_errors = answers_or_fails(write, monkeypatch, step)
    assert num_errors > 4 * num_answers > 0
