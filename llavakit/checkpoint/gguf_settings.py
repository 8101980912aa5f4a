"""What the metadata of GGUF files means: configuration, tokenizer, template and preprocessing.

Owns: read_gguf_config, gguf_processor, gguf_tokenizer, gguf_jinja.
Tokenizer and template are put down as the small files that every other layout has, and read from there, by the same rules.
Two keys are ours: llavakit.template names the conversation template where the chat template's text may be of several, and
clip.vision.image_aspect_ratio, which llama.cpp's first converter wrote too, says how pictures become square.
Files without clip.vision.feature_layer are read as they were meant, not as llama.cpp runs them: its first converter
(clip.has_llava_projector) left out the layers that LLaVA does not run, other files have all of them and the last is not run.
Sources: tools/mtmd/clip.cpp, clip-impl.h and legacy-models/ of llama.cpp; constants.py of the gguf library.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavakit.checkpoint.gguf_read import GgufModel, num_tower_layers, open_gguf
from llavakit.checkpoint.gguf_tokens import end_ids, role_id, tokenizer_files
from llavakit.checkpoint.original import IMAGE_TOKEN, original_processor
from llavakit.errors import CheckpointError, ConfigError
from llavakit.model.config import DECODERS, LlamaConfig
from llavakit.model.llava_config import DEFAULT_PINPOINTS, LlavaConfig, LlavaNextConfig
from llavakit.model.vision_config import ClipVisionConfig, SiglipVisionConfig
from llavakit.processing.chat import ChatTemplate
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.template_choice import TEMPLATE_KEY
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.documents import json_bytes
from llavakit.storage.gguf_file import GgufFile

__all__ = ["OUR_TEMPLATE", "gguf_jinja", "gguf_processor", "gguf_tokenizer", "read_gguf_config"]

OUR_TEMPLATE = "llavakit.template"
_RATIOS = ("pad", "square")  # of pictures that are one tile
_FLOAT32_STEP = 2.0**-24  # of numbers below 1


def read_gguf_config(path: Path, tower: Path | None = None) -> LlamaConfig | LlavaConfig:
    """Read the configuration of a file's or a folder's model. Raises: CheckpointError."""
    with open_gguf(path, tower) as model:
        try:
            text = DECODERS[model.architecture].from_dict(_text_values(model))
            return text if model.tower is None else _llava_config(model.tower, text, _texts(model))
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error


def gguf_processor(
    path: Path, config: LlamaConfig | LlavaConfig, template: ChatTemplate | None, tower: Path | None = None
) -> LlavaProcessor | TextProcessor:
    """Build the processor, and give a LlavaConfig the id of its <image> token. Raises: CheckpointError."""
    with open_gguf(path, tower) as model:
        if not isinstance(config, LlavaConfig):
            with _small_files(model, config) as folder:
                return TextProcessor.from_pretrained(folder, template=template)
        assert model.tower is not None, "config.json says that there are pictures"
        usual = ImageProcessor()
        mean = _triple(model.tower, "clip.vision.image_mean", usual.mean)
        std = _triple(model.tower, "clip.vision.image_std", usual.std)
        with _small_files(model, config) as folder:
            processor = original_processor(folder, config, template, tokenizer=folder)
        return replace(processor, image_processor=replace(processor.image_processor, mean=mean, std=std))


def gguf_jinja(path: Path) -> str | None:
    """Return the chat template of a file. Raises: CheckpointError."""
    with open_gguf(path) as model:
        return model.text.value("tokenizer.chat_template", str)


def gguf_tokenizer(path: Path) -> LlamaTokenizer | LlamaTokenizerFast:
    """Build the tokenizer alone. Raises: CheckpointError."""
    with open_gguf(path) as model, _small_files(model, None) as folder:
        return load_tokenizer(folder)


def _text_values(model: GgufModel) -> dict[str, Any]:
    """Read the language model's settings."""
    file, name, specs = model.text, model.architecture, model.text_specs
    if "token_embd.weight" not in specs:
        raise CheckpointError(f"{file.path} has no token_embd.weight")
    rows = specs["token_embd.weight"].shape[0]
    tokens = file.texts("tokenizer.ggml.tokens")
    if tokens and len(tokens) != rows:
        raise CheckpointError(f"{file.path} has {len(tokens)} tokens and {rows} rows for them; they do not belong together")
    heads = file.stated(f"{name}.attention.head_count", int)
    kv_heads = file.value(f"{name}.attention.head_count_kv", int)
    theta = file.value(f"{name}.rope.freq_base", float)
    width, ends = file.stated(f"{name}.embedding_length", int), end_ids(file)
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": file.stated(f"{name}.feed_forward_length", int),
        "num_hidden_layers": file.stated(f"{name}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": None if model.head_width * heads == width else model.head_width,
        "max_position_embeddings": file.stated(f"{name}.context_length", int),
        "rms_norm_eps": file.stated(f"{name}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": 10000.0 if theta is None else theta,
        "rope_scaling": _rope_scaling(file, name),
        "tie_word_embeddings": "output.weight" not in specs,
        **({} if name == "qwen2" else {"attention_bias": "blk.0.attn_output.bias" in specs}),
        "mlp_bias": "blk.0.ffn_down.bias" in specs,
        "bos_token_id": role_id(file, "bos_token"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": role_id(file, "pad_token"),
    }


def _rope_scaling(file: GgufFile, name: str) -> dict[str, Any] | None:
    kind = file.value(f"{name}.rope.scaling.type", str)
    if "rope_freqs.weight" in file.specs or kind not in (None, "none", "linear"):
        raise CheckpointError(f"{file.path} scales its rotary positions in a way that is not read; none and linear are")
    if kind == "linear":
        return {"type": "linear", "factor": file.stated(f"{name}.rope.scaling.factor", float)}
    older = file.value(f"{name}.rope.scale_linear", float)
    return None if older is None or kind == "none" else {"type": "linear", "factor": older}


def _llava_config(tower: GgufFile, text: LlamaConfig, tokens: list[str]) -> LlavaConfig:
    kind = tower.value("clip.projector_type", str)
    if kind not in (None, "mlp"):
        raise CheckpointError(f"{tower.path} has a projector of the type {kind!r}; mlp is read")
    num_layers = num_tower_layers(tower)
    if (stated := tower.stated("clip.vision.block_count", int)) != num_layers:
        raise CheckpointError(f"{tower.path} has {num_layers} layers of a tower, and states {stated}")
    depths = _feature_depths(tower, num_layers)
    projector = {part for name in tower.specs if name.startswith("mm.") and (part := name.split(".")[1]).isdecimal()}
    image = tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else None
    layers = [depth - num_layers - 1 for depth in depths]
    is_clip = "v.class_embd" in tower.specs
    values = {
        "text_config": text,
        "vision_config": _vision_config(tower, num_layers, is_clip=is_clip),
        "image_token_index": image,
        "mm_projector_type": f"mlp{len(projector)}x_gelu" if len(projector) > 1 else "linear",
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "default" if is_clip else "full",
        "tie_word_embeddings": text.tie_word_embeddings,
        "pad_token_id": text.pad_token_id,
    }
    text.pad_token_id = None  # LLaVA's comes first
    pinpoints = tower.integers("clip.vision.image_grid_pinpoints")
    if len(pinpoints) % 2:
        raise CheckpointError(f"{tower.path} states clip.vision.image_grid_pinpoints={pinpoints[:8]}; expected pairs of width and height")
    has_newline = "v.image_newline" in tower.specs or "model.image_newline" in tower.specs
    if not pinpoints and not has_newline:
        ratio = tower.value("clip.vision.image_aspect_ratio", str)
        if ratio not in (None, *_RATIOS):
            hint = f"{' and '.join(_RATIOS)} are read, anyres with image_grid_pinpoints"
            raise CheckpointError(f"{tower.path} states clip.vision.image_aspect_ratio={ratio}; {hint}")
        return LlavaConfig.from_dict({**values, "image_aspect_ratio": "pad" if ratio is None else ratio})
    merge = tower.value("clip.vision.mm_patch_merge_type", str)
    sizes = [list(pair) for pair in zip(pinpoints[1::2], pinpoints[::2], strict=True)]
    return LlavaNextConfig.from_dict({
        **values,
        "image_grid_pinpoints": sizes or [list(pair) for pair in DEFAULT_PINPOINTS],
        "mm_patch_merge_type": ("spatial_unpad" if has_newline else "flat") if merge is None else merge,
        "image_aspect_ratio": "anyres",
    })  # fmt: skip


def _vision_config(tower: GgufFile, num_layers: int, *, is_clip: bool) -> ClipVisionConfig | SiglipVisionConfig:
    is_gelu = tower.value("clip.use_gelu", bool) is True
    shape = {
        "hidden_size": tower.stated("clip.vision.embedding_length", int),
        "intermediate_size": tower.stated("clip.vision.feed_forward_length", int),
        "num_hidden_layers": num_layers,
        "num_attention_heads": tower.stated("clip.vision.attention.head_count", int),
        "image_size": tower.stated("clip.vision.image_size", int),
        "patch_size": tower.stated("clip.vision.patch_size", int),
        "layer_norm_eps": tower.stated("clip.vision.attention.layer_norm_epsilon", float),
    }
    if is_clip:
        return ClipVisionConfig.from_dict({**shape, "hidden_act": "gelu" if is_gelu else "quick_gelu"})
    return SiglipVisionConfig.from_dict(shape)


def _feature_depths(tower: GgufFile, num_layers: int) -> list[int]:
    """Return the hidden states that are the features, counted from the embedding."""
    if stated := tower.integers("clip.vision.feature_layer"):
        return stated
    has_run_layers_only = tower.value("clip.has_llava_projector", bool) is True
    return [num_layers - int(not has_run_layers_only)]


def _triple(tower: GgufFile, key: str, usual: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return three numbers: the usual ones, where the file has their float32 form. Raises: CheckpointError."""
    numbers = tower.numbers(key)
    least = 1e-6 if key.endswith("std") else -1e3
    if len(numbers) != 3 or not all(least <= number < 1e3 for number in numbers):
        raise CheckpointError(f"{tower.path} states {key}={numbers[:8]}; expected three numbers")
    is_usual = all(abs(number - known) < _FLOAT32_STEP for number, known in zip(numbers, usual, strict=True))
    return usual if is_usual else (numbers[0], numbers[1], numbers[2])


def _texts(model: GgufModel) -> list[str]:
    return model.text.texts("tokenizer.ggml.tokens")


@contextlib.contextmanager
def _small_files(model: GgufModel, config: LlamaConfig | LlavaConfig | None) -> Iterator[Path]:
    """Put down the small files of a checkpoint's folder for as long as the block lasts; errors name the GGUF file."""
    file = model.text
    template = file.value(OUR_TEMPLATE, str)
    files = {
        **tokenizer_files(file),
        **({} if config is None else {"config.json": json_bytes(config.to_dict())}),
        **({} if template is None else {"processor_config.json": json_bytes({TEMPLATE_KEY: template})}),
    }
    with tempfile.TemporaryDirectory(prefix="llavakit-") as name:
        folder = Path(name)
        for small, data in files.items():
            (folder / small).write_bytes(data)
        try:
            yield folder
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}: {str(error).replace(str(folder), 'its metadata')}") from error
