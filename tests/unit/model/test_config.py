"""The three model configurations: both forms of config.json, defaults, refusals."""

import json
from typing import Any

import pytest

from llavakit.errors import ConfigError
from llavakit.geometry import num_image_tokens
from llavakit.model.config import LlamaConfig, MistralConfig, Qwen2Config
from llavakit.model.llava_config import LlavaConfig, LlavaNextConfig, published_tower
from llavakit.model.vision_config import ClipVisionConfig, SiglipVisionConfig, VisionConfig
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlavaLlamaForCausalLM
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


ANYRES = {"model_type": "llava", "mm_hidden_size": 1024, "image_aspect_ratio": "anyres"}


def test_the_published_config_fills_in_what_it_leaves_out() -> None:
    config = LlavaConfig.from_dict(HF_15_7B)
    text = config.text_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_kv_heads) == (4096, 11008, 32, 32)
    assert (text.head_width, text.rope_theta, text.vocab_size, text.rms_norm_eps) == (128, 10000.0, 32064, 1e-5)
    assert config.feature_depths == (23,)
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
        (LlamaConfig, {"rope_scaling": {"type": "linear"}}, "needs 'factor'"),
        (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling['factor'] must be finite and from 1.0"),
        (LlamaConfig, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs 'low_freq_factor'"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        (LlamaConfig, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LlamaConfig, {"rope_scaling": 4}, "must be a table"),
        (LlamaConfig, {"eos_token_id": [2, -1]}, "eos_token_id[1] must be at least 0"),
        (LlamaConfig, {"pad_token_id": -2}, "pad_token_id must be at least 0"),
        (LlamaConfig, {"pretraining_tp": 0}, "pretraining_tp must be from 1"),
        (Qwen2Config, {"use_sliding_window": True}, "use_sliding_window must be one of False"),
        (SiglipVisionConfig, {"image_size": [224, 448]}, "one side of a square"),
        (LlamaConfig, {"rms_norm_eps": float("inf")}, "rms_norm_eps must be finite"),
        (LlamaConfig, {"pad_token_id": 32000}, "pad_token_id must be below vocab_size 32000"),
        (LlamaConfig, {"attention_bias": 1}, "attention_bias must be true or false"),
        (ClipVisionConfig, {"patch_size": 337}, "patch_size 337 must not exceed image_size 336"),
        (ClipVisionConfig, {"hidden_act": "relu"}, "quick_gelu"),
        (LlavaConfig, {"vision_feature_layer": -26}, "vision_feature_layer -26"),
        (LlavaConfig, {"vision_feature_layer": 25}, "vision_feature_layer 25"),
        (LlavaConfig, {"vision_feature_select_strategy": "patch"}, "'default', 'full'"),
        (LlavaConfig, {"mm_projector_type": "resampler"}, "linear, identity or mlpNx_gelu"),
        (LlavaConfig, {"vision_feature_layer": []}, "at least one hidden state"),
        (LlavaConfig, {"mm_projector_type": "identity"}, "as wide as the language model (4096), got 1024"),
        (LlavaConfig, {"model_type": "llava_next", "image_grid_pinpoints": [[300, 336]]}, "multiples of image_size 336"),
        (LlavaConfig, {"model_type": "llava_next", "image_grid_pinpoints": [336, 672]}, "(height, width) pairs"),
        (LlavaConfig, {"model_type": "llava_next", "vision_feature_select_strategy": "full"}, "class tokens"),
        (LlavaConfig, {"model_type": "llava", "mm_vision_tower": "my/tower"}, "'my/tower' is not one of the known towers"),
        (LlavaConfig, {"model_type": "llava_mpt", "mm_hidden_size": 1024}, "'llava_mpt'"),
        (LlavaConfig, {"mm_projector_type": "mlp0x_gelu"}, "mlpNx_gelu"),
        (LlavaConfig, {"text_config": {"model_type": "gemma"}}, "'gemma'; supported are llama, mistral, qwen2"),
        (LlavaConfig, {"vision_config": {"model_type": "dinov2"}}, "'dinov2'; supported are clip_vision_model, siglip_vision_model"),
        (LlavaConfig, {"text_config": 3}, "text_config must be a LlamaConfig or a table"),
        (LlavaConfig, {"tie_word_embeddings": True, "text_config": LlamaConfig()}, "set both or neither"),
        (LlavaConfig, {"model_type": "llava", "mm_hidden_size": 3072}, "mm_hidden_size is 3072"),
        (LlavaConfig, {"model_type": "llava", "mm_hidden_size": 1024, "s2": True}, "s2"),
        (LlavaConfig, {"model_type": "llava", "mm_hidden_size": 1024, "mm_vision_select_feature": ["patch"]}, "got ['patch']"),
        (LlavaConfig, {"model_type": ["llava"], "mm_vision_tower": "x"}, "model_type ['llava']"),
        (LlavaConfig, {"model_type": "llava", "mm_vision_tower": ["x"]}, "must be the name of a tower, got ['x']"),
        (LlavaConfig, {"model_type": "llava", "mm_vision_tower": "x", "vision_config": 3}, "vision_config must be"),
        (LlavaConfig, {**ANYRES, "image_grid_pinpoints": "[(336, " + "6" * 5000 + ")]"}, "or (1x1),...,(6x6), got '[(336, 666"),
        (LlavaConfig, {**ANYRES, "image_grid_pinpoints": "[(336, 672), (672)]"}, "or (1x1),...,(6x6)"),
        (LlavaConfig, {**ANYRES, "image_grid_pinpoints": "(2x2),...,(1x1)"}, "(height, width) pairs, got []"),
        (LlavaConfig, {**ANYRES, "image_grid_pinpoints": "(0x1),...,(2x2)"}, "image_grid_pinpoints must be from 1"),
    ],
)
def test_wrong_values_name_field_value_and_range(
    cls: type[LlamaConfig | VisionConfig | LlavaConfig], values: dict[str, Any], told: str
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


ORIGINAL_16_7B = {  # the fields of liuhaotian/llava-v1.6-vicuna-7b's config.json that say something of the model
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 4096,
    "torch_dtype": "bfloat16",
    "unfreeze_mm_vision_tower": True,
    "use_mm_proj": True,
    "vocab_size": 32000,
}


def test_the_flat_form_is_read_and_written() -> None:
    config = LlavaConfig.from_dict(ORIGINAL_16_7B)
    assert isinstance(config, LlavaNextConfig)
    assert (config.merge, config.has_newline, config.feature_depths) == ("spatial_unpad", True, (23,))
    assert config.image_grid_pinpoints[:2] == [[672, 336], [336, 672]]  # (height, width), in the file's order
    assert (config.text_config.rms_norm_eps, config.text_config.pad_token_id, config.image_token_index) == (1e-5, 0, None)
    assert config.unfreeze_mm_vision_tower is True
    written = config.to_original_dict()
    assert {name: written.get(name) for name in ORIGINAL_16_7B} == {**ORIGINAL_16_7B, "model_type": "llava"}
    assert LlavaConfig.from_dict(json.loads(json.dumps(written))).to_original_dict() == written
    assert LlavaConfig.from_dict(json.loads(config.to_json())) == config


def test_an_absent_projector_type_is_linear_in_the_flat_form_and_two_layers_in_the_nested() -> None:
    flat = LlavaConfig.from_dict({"model_type": "llava", "mm_hidden_size": 1024, "mm_vision_tower": "openai/clip-vit-large-patch14"})
    assert (flat.projector_depth, flat.vision_config.image_size, type(flat)) == (1, 224, LlavaConfig)
    assert LlavaConfig.from_dict({"text_config": {}}).projector_depth == 2


def test_pinpoints_may_be_text_and_flat_is_the_merge_of_files_without_one() -> None:
    text = {**ORIGINAL_16_7B, "image_grid_pinpoints": "[(336, 672), (672, 336)]"}
    del text["mm_patch_merge_type"]
    config = LlavaConfig.from_dict(text)
    assert (config.image_grid_pinpoints, config.merge, config.has_newline) == ([[672, 336], [336, 672]], "flat", False)


@pytest.mark.parametrize("text", ["(1x1),...,(2x3)", "(1x1), (1x2), (2x3)"])
def test_pinpoints_may_be_the_first_and_the_last_grid_of_tiles(text: str) -> None:
    """As LLaVA-NeXT reads them: columns from the first to the last, of each all rows."""
    found = LlavaConfig.from_dict({**ANYRES, "image_grid_pinpoints": text}).to_original_dict()["image_grid_pinpoints"]
    assert found == [[336, 336], [336, 672], [336, 1008], [672, 336], [672, 672], [672, 1008]]


def test_a_padding_of_minus_one_in_a_file_is_none() -> None:
    assert LlamaConfig.from_dict({"pad_token_id": -1}).pad_token_id is None
    flat = LlavaConfig.from_dict({"model_type": "llava", "mm_hidden_size": 1024, "pad_token_id": -1})
    nested = LlavaConfig.from_dict({"pad_token_id": -1, "text_config": {"pad_token_id": -1}})
    assert [(config.pad_token_id, config.text_config.pad_token_id) for config in (flat, nested)] == [(None, None)] * 2
    with pytest.raises(ConfigError, match="pad_token_id must be at least 0"):
        nested.pad_token_id = -1


@pytest.mark.parametrize(
    ("scaling", "kept"),
    [
        ({"type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
        ({"rope_type": "dynamic", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}),
        ({"type": "default"}, None),
    ],
)
def test_scaling_is_read_from_either_spelling_and_written_in_both(scaling: dict[str, Any], kept: dict[str, Any] | None) -> None:
    config = LlamaConfig.from_dict({"rope_scaling": scaling, "rope_theta": 1e5})
    assert config.rope_scaling == kept
    written = config.to_dict()
    assert written["rope_parameters"]["rope_theta"] == 1e5
    assert written["rope_parameters"]["rope_type"] == ("default" if kept is None else kept["type"])
    del written["rope_scaling"]
    assert LlamaConfig.from_dict(written).rope_scaling == kept


def test_contexts_are_stretched_by_linear_scaling_alone() -> None:
    def context(cls: type[LlamaConfig], **values: Any) -> int:
        return cls(max_position_embeddings=4096, **values).context_len

    assert context(LlamaConfig) == context(LlamaConfig, rope_scaling={"type": "dynamic", "factor": 4.0}) == 4096
    assert context(LlamaConfig, rope_scaling={"type": "linear", "factor": 4.0}) == 16384
    assert (context(MistralConfig, sliding_window=512), context(MistralConfig, sliding_window=None)) == (4096, 4096)


def test_transformers_defaults_are_ours() -> None:
    import transformers

    for ours in (LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig):
        theirs = getattr(transformers, ours.__name__)().to_dict()
        for name, value in ours().to_dict().items():
            if name in theirs and name not in ("rope_parameters", "head_dim", "num_key_value_heads", "sliding_window"):
                assert theirs[name] == value, (ours.__name__, name)


def test_a_published_tower_is_known_by_its_id_alone() -> None:
    assert published_tower("openai/clip-vit-large-patch14-336") == ClipVisionConfig()
    assert published_tower("google/siglip-so400m-patch14-384").num_patches == 729


def test_constructors_take_every_spelling_and_names_that_nobody_knows() -> None:
    config = LlavaConfig(image_token_id=7, torch_dtype="float16", text_config={"my-key": 1, "window": 2, "vocab_size": 64})
    assert (config.image_token_index, config.torch_dtype) == (7, "float16")
    assert config.to_dict()["text_config"].items() >= {"my-key": 1, "window": 2, "vocab_size": 64}.items()
    assert LlamaConfig(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}).rope_theta == 5e5
    assert LlamaConfig.from_dict(config.text_config.to_dict()) == config.text_config


def test_nulls_are_absent_where_a_field_holds_none() -> None:
    names = ("rope_theta", "pretraining_tp", "attention_bias", "use_cache", "tie_word_embeddings", "initializer_range")
    assert LlamaConfig.from_dict(dict.fromkeys(names)) == LlamaConfig()
    assert LlamaConfig.from_dict({"bos_token_id": None}).bos_token_id is None
    top = ("tie_word_embeddings", "ignore_index", "vision_feature_select_strategy", "text_config", "vision_config", "vision_feature_layer")
    assert LlavaConfig.from_dict(dict.fromkeys(top)) == LlavaConfig()
    flat = {"model_type": "llava", "mm_hidden_size": 1024}
    keys = ("projector_type", "vision_select_feature", "vision_tower", "vision_select_layer", "hidden_size")
    for name in ("vision_config", *(f"mm_{key}" for key in keys)):
        assert LlavaConfig.from_dict({"mm_vision_tower": "openai/clip-vit-large-patch14-336", **flat, name: None}).to_original_dict()
    assert LlavaConfig.from_dict({"text_config": {}, "mm_hidden_size": None}) == LlavaConfig.from_dict({"text_config": {}})
    small = {**flat, "mm_vision_tower": "openai/clip-vit-large-patch14", "vision_config": None}
    assert LlavaConfig.from_dict(small).vision_config.image_size == 224


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llava_llama", "hidden_size": 64, "num_attention_heads": 4},
        {"model_type": "llava", "hidden_size": 64, "num_attention_heads": 4, "mm_projector_type": "mlp2x_gelu"},
    ],
)
def test_the_flat_form_is_known_by_the_language_models_keys_too(values: dict[str, Any]) -> None:
    assert LlavaConfig.from_dict(values).text_config.hidden_size == 64


def test_absent_flags_of_the_flat_form_are_written_as_they_were_meant() -> None:
    flat = {"model_type": "llava", "mm_hidden_size": 1024, "mm_vision_tower": "/data/openai/clip-vit-large-patch14-336"}
    written = LlavaConfig.from_dict(flat).to_original_dict()
    assert written["mm_use_im_patch_token"] is True
    assert written["mm_vision_tower"] == flat["mm_vision_tower"]


def test_tied_weights_may_be_said_at_the_top_alone() -> None:
    config = LlavaConfig.from_dict({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})
    assert config.text_config.tie_word_embeddings


@pytest.mark.parametrize(("cls", "config"), [(LlamaForCausalLM, LlavaConfig()), (LlavaLlamaForCausalLM, LlamaConfig())])
def test_models_name_the_config_that_they_are_built_from(cls: Any, config: Any) -> None:
    with pytest.raises(ConfigError, match=f"{cls.__name__} is built from a .*, got {type(config).__name__}"):
        cls(config)
