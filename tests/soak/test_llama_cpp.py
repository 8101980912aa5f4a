"""Our GGUF files in llama.cpp itself, where llama-cpp-python is installed: logits, token ids, and features of pictures.

llama.cpp is asked for float32 caches. Of its treatment of pictures two things are copied here, since no file can change them: gelu by
tanh in the projector, and the class token behind the patches, whose row is then taken in place of the first patch's.
"""

import ctypes
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import write_result
from llavakit import LlamaForCausalLM, LlavaLlamaForCausalLM
from llavakit.checkpoint.convert import Conversion, convert
from llavakit.checkpoint.gguf_write import GgufType
from llavakit.checkpoint.hf import save_folder
from llavakit.model.config import LlamaConfig
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.image import ImageProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from tests.real_data import llama2_tokenizer
from tests.tiny import (
    SIDE,
    VARIANTS,
    decoder_config,
    family_config,
    llama,
    llama3_tokenizer_folder,
    llava_config,
    qwen_tokenizer_folder,
    scale_weights,
    tiny_processor,
    tiny_tokenizer,
)
from tests.unit.processing.tokenizer.golden import drawn_texts

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
llama_cpp: Any = pytest.importorskip("llama_cpp")
IDS = [1, 5, 60, 100, 7, 8, 200, 300, 17, 18, 19, 20]
OTHERS = ("rope-linear", "biases", "wide-heads", "mistral", "qwen2")
MOST: dict[GgufType, float] = {"f32": 1e-4, "f16": 0.05, "bf16": 0.4, "q8_0": 1.0, "q4_0": 1.0}
"""Largest differences of logits of about 30: llama.cpp rounds activations to the kind of the weights, for packed ones to 8 bits."""


def their_logits(path: Path) -> Tensor:
    options = {"logits_all": True, "n_ctx": 64, "n_batch": 64, "n_threads": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
    model = llama_cpp.Llama(str(path), verbose=False, **options)
    model.eval(IDS)
    return torch.tensor(np.array(model.scores[: len(IDS)]))


def measure_logits(folder: Path) -> dict[GgufType, float]:
    """Return the largest difference of logits over all models, by type."""
    worst = dict.fromkeys(MOST, 0.0)
    models = {variant.name: llama(variant) for variant in VARIANTS}
    models |= {kind: scale_weights(LlamaForCausalLM(decoder_config(kind))).eval() for kind in OTHERS}
    for name, model in models.items():
        source = folder / name
        save_folder(model, source, processor=tiny_tokenizer())
        for kind in MOST:
            path = folder / f"{name}-{kind}"
            convert(source, path, Conversion(to="gguf", gguf_type=kind))
            ours = LlamaForCausalLM.from_pretrained(path, dtype="float32")(torch.tensor([IDS])).logits[0]
            difference = (their_logits(path / f"model-{kind}.gguf") - ours).abs().max().item()
            worst[kind] = max(worst[kind], difference)
    return worst


def count_tokenizer_differences(folder: Path, tokenizer: LlamaTokenizer | LlamaTokenizerFast) -> tuple[int, int]:
    """Count drawn texts, and those on which llama.cpp's ids are others."""
    config = LlamaConfig(vocab_size=len(tokenizer) + 30, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    save_folder(LlamaForCausalLM(config), folder / "hf", processor=tokenizer)
    convert(folder / "hf", folder / "gguf", Conversion(to="gguf"))
    model = llama_cpp.Llama(str(folder / "gguf" / "model-f16.gguf"), vocab_only=True, verbose=False)
    drawn = drawn_texts(seed=7, count=2000, with_marks=False)
    texts = [text for text in drawn if "\0" not in text and unicodedata.is_normalized("NFC", text)]  # llama.cpp never normalises
    wrong = sum(model.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode_text(text) for text in texts)
    return len(texts), wrong


def their_features(folder: Path, pixels: np.ndarray, width: int) -> Tensor:
    """Return what llama.cpp's mtmd makes of a picture of exactly the tower's size."""
    mtmd = pytest.importorskip("llama_cpp.mtmd_cpp")
    text = llama_cpp.Llama(str(folder / "model-f32.gguf"), verbose=False, n_ctx=64)
    params = mtmd.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.warmup, params.flash_attn_type = False, 1, False, 0
    context = mtmd.mtmd_init_from_file(str(folder / "mmproj-f32.gguf").encode(), text.model, params)
    assert context is not None, "llama.cpp refuses the file"
    data = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
    bitmap, chunks = mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data), mtmd.mtmd_input_chunks_init()
    marker = mtmd.mtmd_default_marker()
    prompt = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
    pictures = [mtmd.mtmd_input_chunks_get(chunks, index) for index in range(mtmd.mtmd_input_chunks_size(chunks))]
    (picture,) = [chunk for chunk in pictures if mtmd.mtmd_input_chunk_get_type(chunk) == 1]
    assert mtmd.mtmd_encode_chunk(context, picture) == 0
    count = mtmd.mtmd_input_chunk_get_n_tokens(picture) * width
    features = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), shape=(count,)).reshape(-1, width).copy()
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    mtmd.mtmd_free(context)
    return torch.from_numpy(features)


def our_features(model: LlavaLlamaForCausalLM, pixels_1PSS: Tensor) -> Tensor:
    """Return our features of a tile, computed as llama.cpp does."""
    tower, depth = model.vision_tower.vision_model, max(model.config.feature_depths)
    embeddings, has_cls = tower.embeddings, model.config.vision_config.has_cls
    x_NPD = embeddings.patch_embedding(pixels_1PSS).flatten(2).transpose(1, 2)
    if has_cls:
        assert embeddings.class_embedding is not None
        x_NPD = torch.cat((x_NPD, embeddings.class_embedding.expand(1, 1, -1)), 1)
    x_NPD = x_NPD + embeddings.position_embedding.weight
    x_NPD = x_NPD if tower.pre_layrnorm is None else tower.pre_layrnorm(x_NPD)
    for layer in list(tower.encoder.layers)[:depth]:
        x_NPD = layer(x_NPD)
    projector = model.multi_modal_projector
    features: Tensor = projector.linear_2(F.gelu(projector.linear_1(x_NPD[0, int(has_cls) :]), approximate="tanh"))
    return features


def measure_features(folder: Path, config: LlavaConfig) -> tuple[float, float]:
    """Return the largest difference of features of a picture, and how large they are."""
    images = ImageProcessor(size_px=SIDE, crop_px=SIDE, aspect="pad")
    model = scale_weights(LlavaLlamaForCausalLM(config)).eval()
    save_folder(model, folder / "hf", processor=tiny_processor(image_processor=images))
    convert(folder / "hf", folder / "gguf", Conversion(to="gguf", gguf_type="f32"))
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    scaled = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (images.mean, images.std))
    with torch.no_grad():
        ours = our_features(model, ((scaled - mean) / std)[None])
    theirs = their_features(folder / "gguf", pixels, config.text_config.hidden_size)
    return (theirs - ours).abs().max().item(), ours.abs().max().item()


def siglip_config() -> LlavaConfig:
    values = family_config("1.6-siglip").to_dict() | {"model_type": "llava"}
    return LlavaConfig.from_dict({name: value for name, value in values.items() if name != "image_grid_pinpoints"})


def test_llama_cpp_computes_what_we_compute(tmp_path: Path) -> None:
    logits = measure_logits(tmp_path / "logits")
    tokenizers: dict[str, LlamaTokenizer | LlamaTokenizerFast] = {
        "tiny": tiny_tokenizer(),
        "llama-2": llama2_tokenizer(),
        "like llama-3": LlamaTokenizerFast.from_pretrained(llama3_tokenizer_folder(tmp_path / "3")),
        "like qwen2": LlamaTokenizerFast.from_pretrained(qwen_tokenizer_folder(tmp_path / "2")),
    }
    counts = {name: count_tokenizer_differences(tmp_path / name, words) for name, words in tokenizers.items()}
    features = {name: measure_features(tmp_path / name, config) for name, config in (("clip", llava_config()), ("siglip", siglip_config()))}
    write_result(
        "llama_cpp",
        "python -m pytest -m soak tests/soak/test_llama_cpp.py",
        {
            "llama_cpp_python": llama_cpp.__version__,
            "largest_difference_of_logits": logits,
            "texts_with_other_ids": {name: f"{wrong} of {count}" for name, (count, wrong) in counts.items()},
            "largest_difference_of_features": {name: {"difference": row[0], "features": row[1]} for name, row in features.items()},
        },
    )
    assert all(logits[kind] <= most for kind, most in MOST.items())
    assert {wrong for _, wrong in counts.values()} == {0}
    assert all(difference < 1e-2 for difference, _ in features.values())  # its gelus are tables of float16 numbers
