"""Configurations of the language model, the vision tower and LLaVA, as config.json holds them.

Owns: LlamaConfig, ClipVisionConfig, LlavaConfig; reading the 4.x and 5.x forms, writing one that both versions read.
Refuses: torch. What this version does not run (RoPE scaling, biases in the decoder, other towers) is a ConfigError here,
not a surprise later. Defaults are transformers' (facts: config files omit fields that have them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from llavakit.config import ModelConfig, boolean, choice, integer, number, optional, setting
from llavakit.errors import ConfigError
from llavakit.geometry import ImageGrid, patch_grid

__all__ = ["ClipVisionConfig", "LlamaConfig", "LlavaConfig"]

_MAX_WIDTH = 1 << 20
_MAX_LAYERS = 4096
_NO_SCALING = ("default", None)
_C = TypeVar("_C", bound=ModelConfig)


def _width(default: int) -> Any:
    return setting(default, integer(1, _MAX_WIDTH), structural=True)


def _layers(default: int) -> Any:
    return setting(default, integer(1, _MAX_LAYERS), structural=True)


@dataclass(kw_only=True, eq=False)
class LlamaConfig(ModelConfig):
    """A Llama-architecture decoder."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int = setting(32000, integer(1, 1 << 24), structural=True)
    """Rows of the embedding and of the head."""
    hidden_size: int = _width(4096)
    """Model width."""
    intermediate_size: int = _width(11008)
    """Width inside the feed-forward block."""
    num_hidden_layers: int = _layers(32)
    """Decoder layers."""
    num_attention_heads: int = _layers(32)
    """Query heads."""
    num_key_value_heads: int | None = setting(None, optional(integer(1, _MAX_LAYERS)), structural=True)
    """Key and value heads; None means as many as query heads."""
    head_dim: int | None = setting(None, optional(integer(2, _MAX_WIDTH)), structural=True)
    """Width of a head; None means hidden_size / num_attention_heads."""
    hidden_act: str = setting("silu", choice("silu"), structural=True)
    """Activation of the gate."""
    max_position_embeddings: int = setting(2048, integer(1, 1 << 30))
    """Context length."""
    initializer_range: float = setting(0.02, number(0.0, 10.0))
    """Standard deviation of fresh weights."""
    rms_norm_eps: float = setting(1e-6, number(0.0, 1.0))
    """Epsilon of the norms."""
    use_cache: bool = setting(True, boolean())
    """Whether forward returns past_key_values by default."""
    tie_word_embeddings: bool = setting(False, boolean(), structural=True)
    """Whether the head is the embedding."""
    rope_theta: float = setting(10000.0, number(1.0, 1e12), structural=True)
    """Base of the rotary frequencies."""
    pad_token_id: int | None = setting(None, optional(integer(0)))
    """Token whose embedding gets no gradient; None pads with nothing in particular."""
    bos_token_id: int | None = setting(1, optional(integer(0)))
    """First token of a prompt."""
    eos_token_id: int | None = setting(2, optional(integer(0)))
    """Token that ends an answer."""
    attention_bias: bool = setting(False, choice(False), structural=True)
    """Biases of the attention projections (none in Llama)."""
    mlp_bias: bool = setting(False, choice(False), structural=True)
    """Biases of the feed-forward block (none in Llama)."""
    pretraining_tp: int = setting(1, choice(1))
    """Slices of the original training's tensor parallelism."""

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads, resolved."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head, resolved."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def get_text_config(self) -> LlamaConfig:
        """Return the language model's config: this one."""
        return self

    def validate(self) -> None:
        """Check divisibility and token ids. Raises: ConfigError."""
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ConfigError(f"heads must have an even width for rotary positions, got {self.head_width}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                f"pad_token_id must be below vocab_size {self.vocab_size}, got {self.pad_token_id}; resize the embedding first"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read either form of the rotary settings: rope_theta + rope_scaling (4.x) or rope_parameters (5.x)."""
        values = dict(values)
        parameters = values.pop("rope_parameters", None)
        scaling = values.pop("rope_scaling", None)
        for table in (parameters, scaling):
            if table is None:
                continue
            if not isinstance(table, Mapping):
                raise ConfigError(f"rope_parameters and rope_scaling must be tables, got {table!r}")
            kind = table.get("rope_type", table.get("type"))
            if kind not in _NO_SCALING:
                raise ConfigError(f"rope scaling of type {kind!r} is not supported; only unscaled rotary positions are")
        if parameters is not None and "rope_theta" in parameters:
            values["rope_theta"] = parameters["rope_theta"]
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Write rope_theta and rope_parameters, so that transformers 4.x and 5.x both read the base."""
        return {**super().to_dict(), "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"}}


@dataclass(kw_only=True, eq=False)
class ClipVisionConfig(ModelConfig):
    """A CLIP vision transformer."""

    model_type: ClassVar[str] = "clip_vision_model"

    hidden_size: int = _width(1024)
    """Tower width."""
    intermediate_size: int = _width(4096)
    """Width inside the feed-forward block."""
    num_hidden_layers: int = _layers(24)
    """Layers in the checkpoint; only those that the features need are run."""
    num_attention_heads: int = _layers(16)
    """Attention heads."""
    image_size: int = setting(336, integer(1, 8192), structural=True)
    """Side of the square input in pixels."""
    patch_size: int = setting(14, integer(1, 1024), structural=True)
    """Side of a patch in pixels."""
    num_channels: int = setting(3, integer(1, 16), structural=True)
    """Colour channels."""
    hidden_act: str = setting("quick_gelu", choice("quick_gelu"), structural=True)
    """Activation of the feed-forward block."""
    layer_norm_eps: float = setting(1e-5, number(0.0, 1.0))
    """Epsilon of the norms."""
    initializer_range: float = setting(0.02, number(0.0, 10.0))
    """Standard deviation of fresh weights."""
    projection_dim: int = setting(768, integer(1, _MAX_WIDTH))
    """Width of CLIP's own projection; LLaVA does not use it."""

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_size // self.patch_size) ** 2

    def validate(self) -> None:
        """Check divisibility. Raises: ConfigError."""
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} must not exceed image_size {self.image_size}")


def _text_config(name: str, value: object) -> LlamaConfig:
    return _part(name, value, LlamaConfig)


def _vision_config(name: str, value: object) -> ClipVisionConfig:
    return _part(name, value, ClipVisionConfig)


def _part(name: str, value: object, cls: type[_C]) -> _C:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a {cls.__name__} or a table, got {value!r}")
    kind = value.get("model_type", cls.model_type)
    if kind != cls.model_type:
        raise ConfigError(f"{name} has model_type {kind!r}; supported is {cls.model_type!r}")
    return cls.from_dict(value)


@dataclass(kw_only=True, eq=False)
class LlavaConfig(ModelConfig):
    """LLaVA-1.5: a CLIP tower, an MLP projector and a Llama decoder."""

    model_type: ClassVar[str] = "llava"

    text_config: LlamaConfig = setting(LlamaConfig, _text_config, structural=True)
    """The language model."""
    vision_config: ClipVisionConfig = setting(ClipVisionConfig, _vision_config, structural=True)
    """The tower."""
    image_token_index: int = setting(32000, integer(0))
    """Id of the positions that hold image features."""
    projector_hidden_act: str = setting("gelu", choice("gelu"), structural=True)
    """Activation between the projector's layers, exact gelu."""
    mm_projector_type: str = setting("mlp2x_gelu", lambda name, value: _projector_type(name, value), structural=True)
    """mlpNx_gelu with N linear layers."""
    multimodal_projector_bias: bool = setting(True, boolean(), structural=True)
    """Whether the projector's layers have biases."""
    vision_feature_layer: int = setting(-2, integer(-_MAX_LAYERS, _MAX_LAYERS), structural=True)
    """Which of the tower's hidden states are the features; 0 is the embedding, negative counts from the end."""
    vision_feature_select_strategy: str = setting("default", choice("default", "full"), structural=True)
    """default drops the class token, full keeps it."""
    tie_word_embeddings: bool = setting(False, boolean(), structural=True)
    """Whether the head is the embedding; must agree with text_config."""
    pad_token_id: int | None = setting(None, optional(integer(0)))
    """Padding of batches."""
    ignore_index: int = setting(-100, choice(-100))
    """Label of positions without loss."""

    @property
    def projector_depth(self) -> int:
        """Linear layers of the projector."""
        return int(self.mm_projector_type.removeprefix("mlp").removesuffix("x_gelu"))

    @property
    def num_vision_layers_used(self) -> int:
        """Tower layers that the features need."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def image_grid(self) -> ImageGrid:
        """The image tokens of one picture."""
        has_cls = self.vision_feature_select_strategy == "full"
        return patch_grid(self.vision_config.image_size, self.vision_config.patch_size, has_cls=has_cls)

    def get_text_config(self) -> LlamaConfig:
        """Return the language model's config."""
        return self.text_config

    def validate(self) -> None:
        """Check the parts and that the feature layer exists. Raises: ConfigError."""
        self.text_config.validate()
        self.vision_config.validate()
        if not 0 <= self.num_vision_layers_used <= self.vision_config.num_hidden_layers:
            raise ConfigError(
                f"vision_feature_layer {self.vision_feature_layer} must name one of the tower's "
                f"{self.vision_config.num_hidden_layers + 1} hidden states"
            )
        if self.tie_word_embeddings and not self.text_config.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings is set for LLaVA but not in text_config; set both or neither")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read config.json; image_token_id is 5.x's name of image_token_index."""
        values = dict(values)
        if "image_token_id" in values:
            values.setdefault("image_token_index", values["image_token_id"])
            del values["image_token_id"]
        if values.get("projector_hidden_act", "gelu") is None:
            del values["projector_hidden_act"]
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Write what transformers reads; the projector's type only where it is not the usual one."""
        values = super().to_dict()
        values["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        values["image_seq_length"] = self.image_grid.rows * self.image_grid.cols + int(self.image_grid.has_cls)
        if self.mm_projector_type == "mlp2x_gelu":
            del values["mm_projector_type"]
        return values


def _projector_type(name: str, value: object) -> str:
    if not isinstance(value, str) or re.fullmatch(r"mlp[1-9]\d?x_gelu", value) is None:
        raise ConfigError(f"{name} must be mlpNx_gelu with N from 1 to 99, got {value!r}")
    return value
