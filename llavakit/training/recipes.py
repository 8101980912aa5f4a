"""The published recipes, and twins of them for the miniature.

Owns: one function per recipe, from a model and its data to a whole TrainConfig. Refuses: torch; what a user overrides comes after.
Each names its source. All of LLaVA's share AdamW with betas 0.9 and 0.999, no weight decay, a cosine schedule down to zero after a
warm-up over 3 % of the steps, 2,048 tokens a sample, and no clipping of gradients (the released runs asked for it where it never
arrived). Sources: arXiv 2304.08485 (v1), arXiv 2310.03744 (v1.5) and the scripts of LLaVA and LLaVA-NeXT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from llavakit.errors import ConfigError
from llavakit.model.lora_config import LoraConfig
from llavakit.training.config import DataConfig, GroupConfig, ModelSource, OptimConfig, SourceConfig, TrainConfig
from llavakit.training.preference_config import PreferenceConfig

__all__ = ["LORA", "RECIPES", "Recipe", "find_recipe"]

Recipe = Callable[[ModelSource, tuple[SourceConfig, ...]], TrainConfig]
LORA = ("*.lora_A", "*.lora_B")
PROJECTOR, LANGUAGE, TOWER, NEWLINE = "multi_modal_projector.*", "language_model.*", "vision_tower.*", "image_newline"
_WARMUP_SHARE = 0.03


def pretrain_v1(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Align a linear projector on captions (CC3M-595K): LLaVA v1, stage 1."""
    return _aligned("pretrain_v1", model, sources, lr=2e-3, samples_per_step=128)


def finetune_v1(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Tune projector and language model on LLaVA-Instruct-158K for three epochs: LLaVA v1, stage 2."""
    return replace(_tuned("finetune_v1", model, sources, samples_per_step=32, epochs=3.0), template="v0")


def scienceqa_v1(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Tune projector and language model on ScienceQA for twelve epochs: LLaVA v1."""
    return replace(_tuned("scienceqa_v1", model, sources, samples_per_step=128, epochs=12.0), template="v0")


def pretrain_v15(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Align an MLP projector on captions (LCS-558K): LLaVA-1.5, stage 1, at half of v1's rate."""
    return _aligned("pretrain_v15", model, sources, lr=1e-3, samples_per_step=256)


def finetune_v15(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Tune projector and language model on mix665K with padded pictures: LLaVA-1.5, stage 2."""
    return replace(_tuned("finetune_v15", model, sources, samples_per_step=128, epochs=1.0), template="v1", preprocess="pad")


def finetune_v15_lora(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Tune LoRA of rank 128 in every product of the language model's layers, and the projector at a tenth of its rate: LLaVA-1.5."""
    config = finetune_v15(model, sources)
    return replace(
        config,
        recipe="finetune_v15_lora",
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
        trainable=(*LORA, PROJECTOR),
        optim=replace(config.optim, lr=2e-4, groups=(GroupConfig(pattern=PROJECTOR, lr=2e-5),)),
    )


def finetune_v15_qlora(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Tune the same over a language model of 4 bits, whose rates v1.5's scripts leave as they are for LoRA."""
    return replace(finetune_v15_lora(model, sources), recipe="finetune_v15_qlora", quantize="nf4")


def finetune_task(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Go on from a LLaVA-1.5 with rows of your own: its stage 2 again, in the template that the model has."""
    return replace(finetune_v15(model, sources), recipe="finetune_task", template=None)


def finetune_v16(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Tune everything, the tower at a fifth of the rate, on pictures in tiles: LLaVA-1.6 as LLaVA-NeXT's scripts have it."""
    config = _tuned("finetune_v16", model, sources, samples_per_step=128, epochs=1.0, lr=1e-5)
    optim = replace(config.optim, groups=(GroupConfig(pattern=TOWER, lr=2e-6),))
    data = replace(config.data, max_sample_tokens=4096, tokens_per_batch=16384)
    return replace(config, trainable=(PROJECTOR, LANGUAGE, TOWER, NEWLINE), optim=optim, data=data)


def dpo(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Prefer better answers to worse ones (DPO, beta 0.1) in the whole language model: as LLaVA-NeXT's script has it, 16 pairs a step."""
    config = _tuned("dpo", model, sources, samples_per_step=16, epochs=1.0, lr=5e-7)
    return replace(config, preference=PreferenceConfig(beta=0.1), optim=replace(config.optim, warmup_share=0.1))


def dpo_lora(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Prefer better answers in LoRA of rank 128, held to the model without it, which needs no memory of its own."""
    config = dpo(model, sources)
    optim = replace(config.optim, lr=5e-6)
    return replace(config, recipe="dpo_lora", lora=LoraConfig(rank=128, alpha=256.0), trainable=LORA, optim=optim)


def sft_text(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
    """Tune a language model on conversations without pictures for three epochs, as Vicuna was from Llama-2."""
    return replace(_tuned("sft_text", model, sources, samples_per_step=128, epochs=3.0), trainable=("*",))


def _aligned(name: str, model: ModelSource, sources: tuple[SourceConfig, ...], *, lr: float, samples_per_step: int) -> TrainConfig:
    """Stage 1: the projector alone, a picture and its caption, pictures cropped to their middle square."""
    config = _tuned(name, model, sources, samples_per_step=samples_per_step, epochs=1.0, lr=lr)
    return replace(config, trainable=(PROJECTOR,), template="plain", preprocess="crop")


def _tuned(
    name: str,
    model: ModelSource,
    sources: tuple[SourceConfig, ...],
    *,
    samples_per_step: int,
    epochs: float,
    lr: float = 2e-5,
) -> TrainConfig:
    """Stage 2: projector and language model, conversations in the model's own template."""
    return TrainConfig(
        recipe=name,
        model=model,
        data=DataConfig(sources=sources),
        optim=OptimConfig(lr=lr, warmup_share=_WARMUP_SHARE),
        samples_per_step=samples_per_step,
        trainable=(PROJECTOR, LANGUAGE),
        epochs=epochs,
    )


def _miniature(recipe: Recipe) -> Recipe:
    """Return the recipe's twin: the same parts at rates, lengths and batches that fit a model of seven million parameters."""

    def twin(model: ModelSource, sources: tuple[SourceConfig, ...]) -> TrainConfig:
        config = recipe(model, sources)
        groups = tuple(replace(group, lr=group.lr * _FASTER) for group in config.optim.groups)
        return replace(
            config,
            recipe=f"miniature_{config.recipe}",
            optim=replace(config.optim, lr=config.optim.lr * _FASTER, groups=groups, clip_norm=1.0),
            data=replace(config.data, tokens_per_batch=2048, max_sample_tokens=1024, window=512),
            samples_per_step=min(config.samples_per_step, 16),
            lora=None if config.lora is None else replace(config.lora, rank=8, alpha=16.0),
        )

    return twin


_FASTER = 10.0
"""A small model learns at higher rates."""
_PUBLISHED: tuple[Recipe, ...] = (
    pretrain_v1, finetune_v1, scienceqa_v1, pretrain_v15, finetune_v15, finetune_v15_lora, finetune_v15_qlora, finetune_task, finetune_v16,
    dpo, dpo_lora, sft_text,
)  # fmt: skip
RECIPES: Mapping[str, Recipe] = {
    **{recipe.__name__: recipe for recipe in _PUBLISHED},
    **{f"miniature_{recipe.__name__}": _miniature(recipe) for recipe in _PUBLISHED},
}
"""All recipes by name."""


def find_recipe(name: str) -> Recipe:
    """Look a recipe up. Raises: ConfigError listing the names."""
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
