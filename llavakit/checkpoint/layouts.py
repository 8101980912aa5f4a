"""The names that tensors have in files, as tables.

Owns: which prefixes of which layout mean which part of our models, and what is dropped and why.
Our own names are family A of llava-hf, so saving renames nothing. The four families (transformers 4.36-4.51, 4.52-4.57, 5.x in
memory, 5.x fresh saves) differ only in these prefixes, and files mix them, so one table of longest prefixes reads them all.
"""

from __future__ import annotations

import functools
import re

from llavakit.checkpoint.rules import Drop, Layout, Rename

__all__ = ["LANGUAGE_MODEL", "LLAMA", "LLAMA_DECODER", "LLAVA_HF", "LLAVA_MODULES", "TOWER", "original_layout"]

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
