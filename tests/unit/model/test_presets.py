"""The published sizes: their numbers of parameters, counted on the meta device, and that they are complete configurations."""

import pytest
import torch

from llavakit.errors import ConfigError
from llavakit.geometry import num_image_tokens
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.presets import PRESETS, preset

PUBLISHED = {  # parameters of the released weights
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llava-1.5-7b": 7_063_427_072,
    "llava-v1.6-mistral-7b": 7_566_747_648,
}


def count(name: str) -> int:
    config = preset(name)
    with torch.device("meta"):
        core = LlavaCore(config) if isinstance(config, LlavaConfig) else LlamaCore(config)
    return sum(weight.numel() for weight in core.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_release(name: str) -> None:
    assert count(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_configuration_that_survives_its_file(name: str) -> None:
    config = preset(name)
    config.validate()
    assert type(config).from_dict(config.to_dict()) == config
    if isinstance(config, LlavaConfig):
        expected = 729 if "interleave" in name else 256 if name.startswith("llava-v1-") else 576
        assert num_image_tokens(config.image_grid) == expected


def test_presets_are_copies() -> None:
    preset("llama-2-7b").hidden_size = 1
    assert preset("llama-2-7b").hidden_size == 4096


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ConfigError, match="there are llama-2-7b"):
        preset("gpt")
