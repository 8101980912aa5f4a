"""Tiny LLaVAs in the folders that original LLaVA writes, named by rules of the tests' own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llavakit.model.llava_config import LlavaConfig, LlavaNextConfig
from llavakit.pretrained.causal_lm import LlavaLlamaForCausalLM
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.tiny import NUM_PIECES, SIDE, family_config, llava_config, scale_weights, tiny_tokenizer

__all__ = ["KINDS", "OriginalFolder", "make_original", "original_names"]

KINDS = ("v1", "v1.5", "v1.5 cls", "v1.6", "v1.6 mistral", "interleave")
_CHATML = {"<|im_start|>": NUM_PIECES, "<|im_end|>": NUM_PIECES + 1}


@dataclass(frozen=True)
class OriginalFolder:
    """A folder, the model that is in it, and its tower's folder where that is another one."""

    path: Path
    model: LlavaLlamaForCausalLM
    tower: Path | None


def original_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights as original LLaVA's state dict does."""
    named, depth = {}, sum(name.startswith("multi_modal_projector.") and name.endswith(".weight") for name in weights)
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        match part:
            case "language_model":
                named[rest] = weight
            case "multi_modal_projector":
                number, _, kind = rest.removeprefix("linear_").partition(".")
                named[f"model.mm_projector.{kind}" if depth == 1 else f"model.mm_projector.{2 * int(number) - 2}.{kind}"] = weight
            case "vision_tower":
                named[f"model.vision_tower.vision_tower.{rest}"] = weight
            case _:
                named[f"model.{name}"] = weight
    return named


def make_original(folder: Path, kind: str, *, pickled: bool = False, tower_inside: bool | None = None) -> OriginalFolder:
    """Write a folder of a kind; the tower is in it for v1.6 unless said otherwise."""
    config, ratio = _config(kind), {"v1": None, "interleave": None}.get(kind, "anyres" if "1.6" in kind else "pad")
    model = scale_weights(LlavaLlamaForCausalLM(config), 3).eval()
    inside = "1.6" in kind if tower_inside is None else tower_inside
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tower = {name: weight for name, weight in weights.items() if name.startswith("vision_tower.")}
    files = original_names({name: weight for name, weight in weights.items() if inside or name not in tower})
    if not inside:
        files |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}  # as v1.5's files have them
    path, other = folder / "original", folder / "tower"
    path.mkdir(parents=True)
    values = flat_values(config, tower=str(other), ratio=ratio, inside=inside)
    (path / "config.json").write_text(json.dumps(values))
    if pickled:
        torch.save(files, path / "pytorch_model.bin")
    else:
        save_file(files, path / "model.safetensors")
    added = _CHATML if kind == "interleave" else {}
    tokenizer = LlamaTokenizer(tiny_tokenizer().files()["tokenizer.model"], added_tokens=added, pad_token="<unk>")
    tokenizer.save_pretrained(path)
    (path / "tokenizer.json").unlink()  # LLaVA's own folders have the slow tokenizer alone
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config.vision_config.to_dict()}))
    if not inside:
        whole = {name.removeprefix("vision_tower."): weight for name, weight in tower.items()}
        whole |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
        save_file(whole, other / "model.safetensors")
    return OriginalFolder(path, model, None if inside else other)


def flat_values(config: LlavaConfig, *, tower: str, ratio: str | None, inside: bool) -> dict[str, Any]:
    """Write config.json by hand, as LLaVA's training leaves it."""
    text = {name: value for name, value in config.text_config.to_dict().items() if name not in ("model_type", "rope_parameters")}
    kind = {"llama": "llava", "mistral": "llava_mistral", "qwen2": "llava_qwen"}[config.text_config.model_type]
    anyres = (
        {"image_grid_pinpoints": [[w, h] for h, w in config.image_grid_pinpoints], "mm_patch_merge_type": "spatial_unpad"}
        if isinstance(config, LlavaNextConfig)
        else {}
    )
    projector = {} if config.mm_projector_type == "linear" else {"mm_projector_type": config.mm_projector_type}
    return {
        **text, **anyres, **projector,
        "model_type": kind, "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": ratio, "mm_vision_tower": tower,
        "mm_hidden_size": config.vision_config.hidden_size, "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if config.image_grid.has_cls else "patch", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "tokenizer_padding_side": "right", "tune_mm_mlp_adapter": False, "use_mm_proj": True,
        "unfreeze_mm_vision_tower": inside, "torch_dtype": "float32", "pad_token_id": 0,
    }  # fmt: skip


def _config(kind: str) -> LlavaConfig:
    family = {"v1.6": "1.6-vicuna", "v1.6 mistral": "1.6-mistral", "interleave": "interleave"}.get(kind)
    values = (llava_config() if family is None else family_config(family)).to_dict()
    rows = NUM_PIECES + len(_CHATML) * (kind == "interleave")  # one for each token, none for <image>
    values["text_config"] = {**values["text_config"], "vocab_size": rows}
    values |= {"image_token_index": None, "pad_token_id": 0, "mm_projector_type": "linear" if kind == "v1" else "mlp2x_gelu"}
    if kind == "v1.5 cls":
        values["vision_feature_select_strategy"] = "full"
    assert values["vision_config"]["image_size"] == SIDE
    return LlavaConfig.from_dict(values)
