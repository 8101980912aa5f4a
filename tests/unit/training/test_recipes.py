"""Recipes: the published numbers, twins for the miniature, and settings that survive their file."""

import pytest

from llavakit.config import build_run_config, override_run_config, run_config_to_dict
from llavakit.errors import ConfigError
from llavakit.training.config import ModelSource, SourceConfig, TrainConfig
from llavakit.training.recipes import RECIPES, find_recipe

MODEL, ROWS = ModelSource(path="llava-hf/llava-1.5-7b-hf"), (SourceConfig(rows="rows.json", images="pictures"),)
# facts of the papers and scripts: rate, samples a step, epochs, template, preprocessing, what trains
PUBLISHED = {
    "pretrain_v1": (2e-3, 128, 1, "plain", "crop", {"multi_modal_projector.*"}),
    "finetune_v1": (2e-5, 32, 3, "v0", "auto", {"multi_modal_projector.*", "language_model.*"}),
    "scienceqa_v1": (2e-5, 128, 12, "v0", "auto", {"multi_modal_projector.*", "language_model.*"}),
    "pretrain_v15": (1e-3, 256, 1, "plain", "crop", {"multi_modal_projector.*"}),
    "finetune_v15": (2e-5, 128, 1, "v1", "pad", {"multi_modal_projector.*", "language_model.*"}),
    "finetune_v15_lora": (2e-4, 128, 1, "v1", "pad", {"multi_modal_projector.*", "*.lora_A", "*.lora_B"}),
    "finetune_v15_qlora": (2e-4, 128, 1, "v1", "pad", {"multi_modal_projector.*", "*.lora_A", "*.lora_B"}),
    "finetune_v16": (1e-5, 128, 1, None, "auto", {"multi_modal_projector.*", "language_model.*", "vision_tower.*", "image_newline"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name: str) -> None:
    config = RECIPES[name](MODEL, ROWS)
    rate, samples, epochs, template, preprocess, trainable = PUBLISHED[name]
    found = (config.optim.lr, config.samples_per_step, config.epochs, config.template, config.preprocess, set(config.trainable))
    assert found == (rate, samples, epochs, template, preprocess, trainable)
    optim = config.optim
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert (optim.warmup_share, optim.schedule, optim.final_lr_share, optim.clip_norm) == (0.03, "cosine", 0.0, None)


def test_lora_and_the_tower_have_rates_of_their_own() -> None:
    config = RECIPES["finetune_v15_lora"](MODEL, ROWS)
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 256.0, 0.05)
    assert [(group.pattern, group.lr) for group in config.optim.groups] == [("multi_modal_projector.*", 2e-5)]
    assert [(group.pattern, group.lr) for group in RECIPES["finetune_v16"](MODEL, ROWS).optim.groups] == [("vision_tower.*", 2e-6)]
    assert RECIPES["finetune_v15_qlora"](MODEL, ROWS).quantize == "nf4"


@pytest.mark.parametrize("name", RECIPES)
def test_settings_survive_their_file_and_know_their_recipe(name: str) -> None:
    config = RECIPES[name](MODEL, ROWS)
    assert build_run_config(TrainConfig, run_config_to_dict(config)) == config
    assert config.recipe == name
    assert config.data.sources == ROWS


def test_every_recipe_has_a_twin_for_the_miniature() -> None:
    names = [name for name in RECIPES if not name.startswith("miniature_")]
    assert {f"miniature_{name}" for name in names} == set(RECIPES) - set(names)
    assert all(RECIPES[f"miniature_{name}"](MODEL, ROWS).trainable == RECIPES[name](MODEL, ROWS).trainable for name in names)


def test_overrides_are_typed_and_strict() -> None:
    config = find_recipe("finetune_v15")(MODEL, ROWS)
    changed = override_run_config(config, ["optim.lr=1e-5", "data.max_sample_tokens=1024", 'lora={"rank": 8, "alpha": 16}', "template=v0"])
    assert (changed.optim.lr, changed.data.max_sample_tokens, changed.template) == (1e-5, 1024, "v0")
    assert changed.lora is not None
    assert changed.lora.rank == 8
    for wrong in ("optim.rate=1", "optimiser.lr=1", "optim.lr=high", "samples_per_step=1.5", "lora.rank=8", "optim.lr", "quantize=nf4"):
        with pytest.raises(ConfigError):
            override_run_config(config, [wrong])
    with pytest.raises(ConfigError, match="there is no recipe 'finetune'"):
        find_recipe("finetune")
