"""The names that tensors have in files, as tables.

Owns: which prefixes of which layout mean which part of our models, and what is dropped and why.
Our own names are family A of llava-hf, so saving renames nothing. The four families (transformers 4.36-4.51, 4.52-4.57, 5.x in
memory, 5.x fresh saves) differ only in these prefixes, and files mix them, so one table of longest prefixes reads them all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from llavakit.checkpoint.rules import Drop, Layout, Rename

__all__ = [
    "LANGUAGE_MODEL",
    "LLAMA",
    "LLAMA_DECODER",
    "LLAVA_HF",
    "LLAVA_MODULES",
    "TEXT_PREFIX",
    "TOWER",
    "VOCABULARY",
    "gguf_layout",
    "gguf_tower_layout",
    "original_layout",
]

TEXT_PREFIX = "language_model."
"""What our names of a LLaVA's language model begin with."""
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
"""What the names of the tables with a row for each token end with."""
_PROJECTOR, _ORIGINAL_TOWER = "model.mm_projector.", "model.vision_tower.vision_tower."
_DROPS = (
    Drop(r"(.+\.)?rotary_emb\.inv_freq", "rotary frequencies are computed from the config"),
    Drop(r"(.+\.)?embeddings\.position_ids", "a constant"),
    Drop(r"(model\.)?vision_tower\.(vision_model\.)?head\..+", "SigLIP's pooling head, which LLaVA does not use"),
)

LLAVA_HF = Layout(
    name="llava-hf",
    renames=(
        Rename("language_model.model.", "language_model.model."),
        Rename("language_model.lm_head.", "language_model.lm_head."),
        Rename("model.language_model.", "language_model.model."),
        Rename("lm_head.", "language_model.lm_head."),
        Rename("vision_tower.vision_model.", "vision_tower.vision_model."),
        Rename("vision_tower.", "vision_tower.vision_model."),
        Rename("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        Rename("model.vision_tower.", "vision_tower.vision_model."),
        Rename("image_newline", "image_newline"),
        Rename("model.image_newline", "image_newline"),
        Rename("multi_modal_projector.", "multi_modal_projector."),
        Rename("model.multi_modal_projector.", "multi_modal_projector."),
    ),
    drops=_DROPS,
)
LLAVA_MODULES = Layout(
    name="transformers' LLaVA in memory",
    renames=(
        Rename("model.language_model.", "language_model.model."),
        Rename("lm_head.", "language_model.lm_head."),
        Rename("model.vision_tower.", "vision_tower.vision_model."),
        Rename("model.image_newline", "image_newline"),
        Rename("model.multi_modal_projector.", "multi_modal_projector."),
    ),
)
"""Family 5.x, by which PEFT finds the modules of LlavaForConditionalGeneration and LlavaNextForConditionalGeneration."""
TOWER = Layout(
    name="vision tower",
    renames=(
        Rename("vision_model.", "vision_tower.vision_model."),
        *(Rename(part, f"vision_tower.vision_model.{part}") for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")),
    ),
    drops=(
        *_DROPS,
        Drop(r"(text_model|visual_projection|text_projection)\..+|logit_(scale|bias)", "CLIP's text side, which LLaVA does not use"),
        Drop(r"(vision_model\.)?head\..+", "SigLIP's pooling head, which LLaVA does not use"),
    ),
)
"""A tower alone, or a whole CLIP or SigLIP."""
LLAMA = Layout(name="llama", renames=(Rename("model.", "model."), Rename("lm_head.", "lm_head.")), drops=_DROPS)
LANGUAGE_MODEL = Layout(
    name="language model",
    renames=(Rename("model.", "language_model.model."), Rename("lm_head.", "language_model.lm_head.")),
    drops=_DROPS,
)
"""A Llama on which a LLaVA is built."""
LLAMA_DECODER = Layout(
    name="llama decoder",
    renames=(Rename("model.", ""), Rename("embed_tokens.", "embed_tokens."), Rename("layers.", "layers."), Rename("norm.", "norm.")),
    drops=(*_DROPS, Drop(r"lm_head\.weight", "a bare decoder has no head")),
)


@functools.cache
def original_layout(projector_depth: int) -> Layout:
    """Return the names of original LLaVA's files, v1 to v1.6, whose projector is one layer or a sequence with gelus in between."""
    numbered = tuple(Rename(f"{_PROJECTOR}{2 * index}.", f"multi_modal_projector.linear_{index + 1}.") for index in range(projector_depth))
    return Layout(
        name="original LLaVA",
        renames=(
            Rename("model.", "language_model.model."),
            Rename("lm_head.", "language_model.lm_head."),
            Rename(f"{_ORIGINAL_TOWER}vision_model.", "vision_tower.vision_model."),
            Rename(_ORIGINAL_TOWER, "vision_tower.vision_model."),
            Rename("model.image_newline", "image_newline"),
            *((Rename(_PROJECTOR, "multi_modal_projector.linear_1."),) if projector_depth == 1 else numbered),
        ),
        drops=(
            *_DROPS,
            Drop(rf"{re.escape(_ORIGINAL_TOWER)}(vision_model\.)?(embeddings\.position_ids|head\..+)", "a constant, or unused"),
        ),
    )


_GGUF_LAYER: Mapping[str, str] = {
    "attn_q.": "self_attn.q_proj.", "attn_k.": "self_attn.k_proj.", "attn_v.": "self_attn.v_proj.", "attn_output.": "self_attn.o_proj.",
    "attn_norm.": "input_layernorm.", "ffn_norm.": "post_attention_layernorm.",
    "ffn_gate.": "mlp.gate_proj.", "ffn_up.": "mlp.up_proj.", "ffn_down.": "mlp.down_proj.",
}  # fmt: skip
_GGUF_TOWER_LAYER: Mapping[str, str] = {
    "attn_q.": "self_attn.q_proj.", "attn_k.": "self_attn.k_proj.", "attn_v.": "self_attn.v_proj.", "attn_out.": "self_attn.out_proj.",
    "ln1.": "layer_norm1.", "ln2.": "layer_norm2.",
}  # fmt: skip


def gguf_layout(num_layers: int, prefix: str, head: str | None) -> Layout:
    """Return the names of a language model in a GGUF file; prefix and head are ours of the decoder and of its head.

    head is None for a bare decoder.
    """
    layers = (
        Rename(f"blk.{index}.{source}", f"{prefix}layers.{index}.{target}")
        for index in range(num_layers)
        for source, target in _GGUF_LAYER.items()
    )
    return Layout(
        name="GGUF",
        renames=(
            Rename("token_embd.", f"{prefix}embed_tokens."),
            Rename("output_norm.", f"{prefix}norm."),
            *((Rename("output.", head),) if head is not None else ()),
            *layers,
        ),
        drops=(Drop(r"output\.weight", "a bare decoder has no head"),) if head is None else (),
    )


def gguf_tower_layout(num_layers: int, projector_depth: int, *, is_swapped: bool) -> Layout:
    """Return the names of tower and projector in a GGUF file.

    is_swapped is llama.cpp's first naming, in which ffn_down widens and ffn_up narrows.
    """
    fc1, fc2 = ("ffn_down.", "ffn_up.") if is_swapped else ("ffn_up.", "ffn_down.")
    tower, layer = "vision_tower.vision_model.", {**_GGUF_TOWER_LAYER, fc1: "mlp.fc1.", fc2: "mlp.fc2."}
    return Layout(
        name="GGUF tower",
        renames=(
            Rename("v.class_embd", f"{tower}embeddings.class_embedding"),
            Rename("v.patch_embd.", f"{tower}embeddings.patch_embedding."),
            Rename("v.position_embd.", f"{tower}embeddings.position_embedding."),
            Rename("v.pre_ln.", f"{tower}pre_layrnorm."),
            Rename("v.post_ln.", f"{tower}post_layernorm."),
            *(
                Rename(f"v.blk.{index}.{source}", f"{tower}encoder.layers.{index}.{target}")
                for index in range(num_layers)
                for source, target in layer.items()
            ),
            *(Rename(f"mm.{2 * index}.", f"multi_modal_projector.linear_{index + 1}.") for index in range(projector_depth)),
            *((Rename("mm.", "multi_modal_projector.linear_1."),) if projector_depth == 1 else ()),
            Rename("v.image_newline", "image_newline"),
            Rename("model.image_newline", "image_newline"),
        ),
        drops=(Drop(r"v\.head\..+", "SigLIP's pooling head, which LLaVA does not use"),),
    )
