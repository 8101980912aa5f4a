"""Every road between layouts: one model in each of them, into each of them, and back.

The weights are exact in float16 and bfloat16, so that no layout has an excuse for a changed bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit import LLM, Conversation, LlavaLlamaForCausalLM, SamplingParams
from llavakit.checkpoint.convert import Conversion, Output, convert
from llavakit.checkpoint.load import load_config
from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.verify import Comparison, verify
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.original_folders import make_original, original_names

PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 70, 30))
GREEDY = SamplingParams(max_tokens=8)
STEP = 1 / 64


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what it needs beside itself."""

    path: Path
    sources: Sources = field(default_factory=Sources)

    @property
    def options(self) -> dict[str, Any]:
        """What LLM takes."""
        return {"base": self.sources.base, "vision_tower": self.sources.vision_tower, "allow_pickle": self.sources.allow_pickle}


def make_exact(folder: Path) -> Path:
    """Write an original v1.5 folder with the tower in it, whose weights are exact in 16 bits."""
    made = make_original(folder, "v1.5", tower_inside=True)
    path = made.path / "model.safetensors"
    save_file({name: (weight / STEP).round().clamp(-128, 128) * STEP for name, weight in load_file(path).items()}, path)
    return made.path


def original(folder: Path, exact: Path) -> Source:
    return Source(exact)


def original_shards_of_pickles(folder: Path, exact: Path) -> Source:
    shutil.copytree(exact, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(exact / "model.safetensors")
    names = [sorted(weights)[place::2] for place in range(2)]
    files = {f"pytorch_model-{place}.bin": part for place, part in enumerate(names)}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return Source(folder, Sources(allow_pickle=True))


def original_tower_apart(folder: Path, exact: Path) -> Source:
    shutil.copytree(exact, folder)
    tower = folder.parent / "clip"
    weights, prefix = load_file(exact / "model.safetensors"), "model.vision_tower.vision_tower."
    save_file({name: weight for name, weight in weights.items() if not name.startswith(prefix)}, folder / "model.safetensors")
    tower.mkdir()
    shutil.copyfile(exact.parent / "tower" / "config.json", tower / "config.json")
    save_file(
        {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}, tower / "model.safetensors"
    )
    return Source(folder, Sources(vision_tower=tower))


def original_delta(folder: Path, exact: Path) -> Source:
    """The base has the language model, the delta its difference and everything else whole."""
    shutil.copytree(exact, folder)
    weights = load_file(exact / "model.safetensors")
    whole = {name for name in weights if name.startswith(("model.mm_projector.", "model.vision_tower.", "model.image_newline"))}
    base = {
        name: weight + STEP * (torch.arange(weight.numel()) % 3).view(weight.shape) for name, weight in weights.items() if name not in whole
    }
    save_file({name: weight if name in whole else weight - base[name] for name, weight in weights.items()}, folder / "model.safetensors")
    return Source(folder, Sources(base=_language_model(folder.parent / "base", exact, base)))


def original_projector(folder: Path, exact: Path) -> Source:
    weights = load_file(exact / "model.safetensors")
    tower = original_tower_apart(folder.parent / "whole", exact).sources.vision_tower
    folder.mkdir()
    shutil.copyfile(exact / "config.json", folder / "config.json")
    torch.save({name: weight for name, weight in weights.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    words = {name: weight for name, weight in weights.items() if not name.startswith(("model.mm_projector.", "model.vision_tower."))}
    base = _language_model(folder.parent / "base", exact, words)
    return Source(folder, Sources(base=base, vision_tower=tower, allow_pickle=True))


def _language_model(folder: Path, exact: Path, weights: Mapping[str, Tensor]) -> Path:
    convert(exact, folder, Conversion(to="text"))
    (folder / "model.safetensors").unlink()
    save_file(dict(weights), folder / "model.safetensors")
    return folder


def llava_hf(folder: Path, exact: Path) -> Source:
    convert(exact, folder)
    return Source(folder)


def _renamed(folder: Path, exact: Path, prefixes: Mapping[str, str]) -> Source:
    convert(exact, folder)
    path = folder / "model.safetensors"

    def renamed(name: str) -> str:
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        return prefixes[old] + name.removeprefix(old)

    save_file({renamed(name): weight for name, weight in load_file(path).items()}, path)
    return Source(folder)


IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def llava_hf_in_memory_names(folder: Path, exact: Path) -> Source:
    return _renamed(folder, exact, {**IN_MEMORY, "vision_tower.vision_model.": "model.vision_tower."})


def llava_hf_names_of_4_52(folder: Path, exact: Path) -> Source:
    return _renamed(folder, exact, {**IN_MEMORY, "vision_tower.": "model.vision_tower."})


def llava_hf_names_of_5(folder: Path, exact: Path) -> Source:
    names = {
        "language_model.": "language_model.",
        "vision_tower.vision_model.": "vision_tower.",
        "multi_modal_projector.": "multi_modal_projector.",
    }
    return _renamed(folder, exact, names)


def gguf(folder: Path, exact: Path) -> Source:
    convert(exact, folder, Conversion(to="gguf", gguf_type="f16"))
    return Source(folder)


SOURCES: dict[str, Callable[[Path, Path], Source]] = {
    maker.__name__: maker
    for maker in (
        original, original_shards_of_pickles, original_tower_apart, original_delta, original_projector, llava_hf, llava_hf_in_memory_names,
        llava_hf_names_of_4_52, llava_hf_names_of_5, gguf,
    )
}  # fmt: skip
OUTPUTS: tuple[Output, ...] = ("hf", "original", "text", "gguf")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exact(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def expected(exact: Path) -> tuple[int, ...]:
    return answer(Source(exact))


def answer(source: Source) -> tuple[int, ...]:
    llm = LLM(source.path, dtype="float32", device="cpu", **source.options)
    ids: tuple[int, ...] = llm.chat(Conversation.ask("what is there?", PICTURE), GREEDY).ids
    return ids


@pytest.mark.parametrize("to", OUTPUTS)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_road_keeps_every_bit_and_the_answer(tmp_path: Path, exact: Path, expected: tuple[int, ...], kind: str, to: Output) -> None:
    source = SOURCES[kind](tmp_path / "source", exact)
    reached = tmp_path / to
    convert(source.path, reached, Conversion(to=to, sources=source.sources, gguf_type="f32" if to == "gguf" else None))
    found = verify(exact, reached)
    assert (found.problems, found.max_weight_difference, found.max_logit_difference) == ((), 0.0, 0.0)
    if to != "text":
        assert answer(Source(reached)) == expected


@pytest.mark.parametrize("kind", ["original", "llava_hf"])
@pytest.mark.parametrize("to", ["hf", "original", "gguf"])
def test_there_and_back_is_the_same_folder(tmp_path: Path, exact: Path, kind: str, to: Output) -> None:
    source = SOURCES[kind](tmp_path / "source", exact)
    back: Output = "hf" if kind == "llava_hf" else "original"
    convert(source.path, tmp_path / "there", Conversion(to=to, gguf_type="f32" if to == "gguf" else None))
    convert(tmp_path / "there", tmp_path / "back", Conversion(to=back))
    first, second = load_file(source.path / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(first) == set(second)
    changed = [name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name])]
    assert [name for name in changed if "post_layernorm" not in name] == []
    assert (to == "gguf") == bool(changed)
    if to != "gguf":
        assert _meaning(source.path) == _meaning(tmp_path / "back")


def _meaning(folder: Path) -> dict[str, Any]:
    return load_config(folder).to_original_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_lose_nothing_of_these_weights(tmp_path: Path, exact: Path, dtype: torch.dtype) -> None:
    convert(exact, tmp_path / "half", Conversion(dtype=dtype))
    found = verify(exact, tmp_path / "half")
    assert (found.problems, found.max_weight_difference) == ((), 0.0)


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 0.03), ("q4_0", 0.3)])
def test_packing_loses_no_more_than_its_steps(tmp_path: Path, exact: Path, kind: Any, most: float) -> None:
    convert(exact, tmp_path / "packed", Conversion(to="gguf", gguf_type=kind))
    found = verify(exact, tmp_path / "packed", Comparison(atol=most, runs_models=False))
    assert found.problems == ()


def test_the_makers_names_are_originals(exact: Path) -> None:
    model = LlavaLlamaForCausalLM.from_pretrained(exact)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    stored = load_file(exact / "model.safetensors")
    assert all(torch.equal(weight, stored[name]) for name, weight in original_names(weights).items())
    for dtype in (torch.float16, torch.bfloat16):
        assert all(torch.equal(weight.to(dtype).float(), weight) for weight in stored.values())
