"""The three model configurations: both forms of config.json, defaults, refusals."""

import json
from typing import Any

import pytest

from llavakit.errors import ConfigError
from llavakit.geometry import num_image_tokens
from llavakit.model.config import ClipVisionConfig, LlamaConfig, LlavaConfig
from llavakit.pretrained.causal_lm import LlavaLlamaForCausalLM
from tests.tiny import llava, llava_config

HF_15_7B = {  # the fields of llava-hf/llava-1.5-7b-hf's config.json
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def test_the_published_config_fills_in_what_it_leaves_out() -> None:
    config = LlavaConfig.from_dict(HF_15_7B)
    text = config.text_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_kv_heads) == (4096, 11008, 32, 32)
    assert (text.head_width, text.rope_theta, text.vocab_size, text.rms_norm_eps) == (128, 10000.0, 32064, 1e-5)
    assert config.num_vision_layers_used == 23
    assert num_image_tokens(config.image_grid) == 576
    assert config.projector_depth == 2
    assert config.architectures == ["LlavaForConditionalGeneration"]


def test_writing_keeps_everything_that_was_read() -> None:
    written = LlavaConfig.from_dict(HF_15_7B).to_dict()
    for name, value in HF_15_7B.items():
        if isinstance(value, dict):
            assert value.items() <= written[name].items()
        else:
            assert written[name] == value
    assert LlavaConfig.from_dict(json.loads(json.dumps(written))) == LlavaConfig.from_dict(HF_15_7B)


def test_transformers_reads_what_we_write_and_we_read_what_it_writes() -> None:
    from transformers import LlavaConfig as HfLlavaConfig

    ours = llava_config()
    theirs = HfLlavaConfig(**json.loads(ours.to_json()))
    assert theirs.text_config.num_key_value_heads == 2
    assert theirs.text_config.rope_parameters["rope_theta"] == 10000.0
    back = LlavaConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    for name in ("hidden_size", "num_key_value_heads", "vocab_size", "rope_theta", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(back.text_config, name) == getattr(ours.text_config, name)
    assert (back.image_token_index, back.image_grid) == (ours.image_token_index, ours.image_grid)


def test_a_short_file_of_transformers_5_is_read() -> None:
    from transformers import LlavaConfig as HfLlavaConfig

    back = LlavaConfig.from_dict(json.loads(HfLlavaConfig().to_json_string()))
    assert back.text_config.hidden_size == 4096
    assert back.vision_config.image_size == 336


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
)
def test_both_spellings_of_the_rotary_base(rope: dict[str, Any]) -> None:
    config = LlamaConfig.from_dict(rope)
    assert config.rope_theta == 5e5
    assert LlamaConfig.from_dict(config.to_dict()).rope_theta == 5e5


def test_both_names_of_the_image_token() -> None:
    assert LlavaConfig.from_dict({"image_token_id": 7}).image_token_index == 7
    assert LlavaConfig.from_dict({"image_token_index": 7}).image_token_index == 7


@pytest.mark.parametrize(
    ("cls", "values", "told"),
    [
        (LlamaConfig, {"hidden_size": 0}, "hidden_size must be from 1"),
        (LlamaConfig, {"hidden_size": "64"}, "hidden_size must be an integer"),
        (LlamaConfig, {"hidden_size": 65, "num_attention_heads": 4}, "must be a multiple of num_attention_heads 4"),
        (LlamaConfig, {"num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 48}, "num_key_value_heads 4"),
        (LlamaConfig, {"head_dim": 3}, "even width"),
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act must be one of 'silu'"),
        (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        (LlamaConfig, {"rope_scaling": 4}, "must be tables"),
        (LlamaConfig, {"rms_norm_eps": float("inf")}, "rms_norm_eps must be finite"),
        (LlamaConfig, {"pad_token_id": 32000}, "pad_token_id must be below vocab_size 32000"),
        (LlamaConfig, {"attention_bias": True}, "attention_bias"),
        (ClipVisionConfig, {"patch_size": 337}, "patch_size 337 must not exceed image_size 336"),
        (ClipVisionConfig, {"hidden_act": "gelu"}, "quick_gelu"),
        (LlavaConfig, {"vision_feature_layer": -26}, "vision_feature_layer -26"),
        (LlavaConfig, {"vision_feature_layer": 25}, "vision_feature_layer 25"),
        (LlavaConfig, {"vision_feature_select_strategy": "patch"}, "'default', 'full'"),
        (LlavaConfig, {"mm_projector_type": "linear"}, "mlpNx_gelu"),
        (LlavaConfig, {"mm_projector_type": "mlp0x_gelu"}, "mlpNx_gelu"),
        (LlavaConfig, {"text_config": {"model_type": "mistral"}}, "'mistral'"),
        (LlavaConfig, {"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        (LlavaConfig, {"text_config": 3}, "text_config must be a LlamaConfig or a table"),
        (LlavaConfig, {"tie_word_embeddings": True}, "set both or neither"),
    ],
)
def test_wrong_values_name_field_value_and_range(
    cls: type[LlamaConfig | ClipVisionConfig | LlavaConfig], values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        cls.from_dict(values)
    assert told in str(caught.value)


def test_a_built_models_config_takes_ids_but_no_shapes() -> None:
    model = llava()
    model.config.pad_token_id = 32001
    model.config.text_config.eos_token_id = 7
    with pytest.raises(ConfigError, match="already built"):
        model.config.text_config.hidden_size = 128
    with pytest.raises(ConfigError, match="already built"):
        model.config.vision_config.image_size = 56
    with pytest.raises(ConfigError, match="already built"):
        model.config.vision_feature_layer = -1
    with pytest.raises(ConfigError, match="at least 0"):
        model.config.pad_token_id = -1


def test_one_config_may_build_several_models() -> None:
    config = llava_config()
    assert LlavaLlamaForCausalLM(config).config is LlavaLlamaForCausalLM(config).config


@pytest.mark.parametrize(("depth", "names"), [(1, {"linear_1"}), (2, {"linear_1", "linear_2"}), (3, {"linear_1", "linear_2", "linear_3"})])
def test_the_projector_has_as_many_layers_as_its_name_says(depth: int, names: set[str]) -> None:
    config = llava_config()
    config.mm_projector_type = f"mlp{depth}x_gelu"
    model = LlavaLlamaForCausalLM(config)
    assert {name for name, _ in model.multi_modal_projector.named_children()} == names
    assert LlavaConfig.from_dict(config.to_dict()).projector_depth == depth
