"""Configurations of the decoders: Llama, and the models of its architecture with other defaults (Mistral, Qwen2).

Owns: ForwardConfig, LlamaConfig, MistralConfig, Qwen2Config, DECODERS; reading the 4.x and 5.x forms, writing one that both versions read.
Refuses: torch. What is not run (other activations, other rotary scalings, windows of some layers only) is a ConfigError here, not a
surprise later. Defaults are transformers': files omit fields that have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llavakit.config import ModelConfig, boolean, choice, integer, number, optional, setting
from llavakit.errors import ConfigError

__all__ = ["DECODERS", "MAX_LAYERS", "MAX_WIDTH", "ForwardConfig", "LlamaConfig", "MistralConfig", "Qwen2Config", "layers", "width"]

MAX_WIDTH = 1 << 20
MAX_LAYERS = 4096
_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary scaling with the numbers that each needs."""


def width(default: int) -> Any:
    """Declare a width."""
    return setting(default, integer(1, MAX_WIDTH), structural=True)


def layers(default: int) -> Any:
    """Declare a number of layers or heads."""
    return setting(default, integer(1, MAX_LAYERS), structural=True)


def _token_ids(name: str, value: object) -> int | list[int] | None:
    """Accept one id, several (Llama-3 ends its turns with either of two), or none."""
    if isinstance(value, list | tuple):
        return [integer(0)(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return optional(integer(0))(name, value)  # type: ignore[no-any-return]


def _rope_scaling(name: str, value: object) -> dict[str, Any] | None:
    """Accept {"type" or "rope_type": kind, numbers}; an unscaled kind counts as None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a table such as {{'type': 'linear', 'factor': 2.0}}, got {value!r}")
    kind = value.get("rope_type", value.get("type"))
    if kind in ("default", None):
        return None
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ConfigError(f"{name} of type {kind!r} is not supported; supported are {', '.join(_SCALINGS)}")
    numbers = {}
    for key in _SCALINGS[kind]:
        if key not in value:
            raise ConfigError(f"{name} of type {kind!r} needs {key!r}, got {dict(value)!r}")
        is_length = key == "original_max_position_embeddings"
        numbers[key] = (integer(1, 1 << 30) if is_length else number(1.0 if key == "factor" else 1e-6, 1e6))(f"{name}[{key!r}]", value[key])
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise ConfigError(f"{name}['high_freq_factor'] must be above low_freq_factor, got {dict(value)!r}")
    return {"type" if kind != "llama3" else "rope_type": kind, **numbers}


@dataclass(kw_only=True, eq=False, init=False)
class ForwardConfig(ModelConfig):
    """What forward returns where the call does not say."""

    output_attentions: bool = setting(False, boolean())
    """Return the attention weights of every layer."""
    output_hidden_states: bool = setting(False, boolean())
    """Return the hidden states of every layer."""
    return_dict: bool = setting(True, boolean())
    """Return an output with names, not a tuple."""

    @classmethod
    def normalize(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Read a pad_token_id of -1, by which Meta and early files of transformers say that there is none."""
        values = super().normalize(values)
        if values.get("pad_token_id") == -1:
            values["pad_token_id"] = None
        return values

    def to_dict(self) -> dict[str, Any]:
        """Write these only where they are not the usual ones."""
        usual = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
        return {name: value for name, value in super().to_dict().items() if name not in usual or value is not usual[name]}


@dataclass(kw_only=True, eq=False, init=False)
class LlamaConfig(ForwardConfig):
    """A Llama-architecture decoder."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int = setting(32000, integer(1, 1 << 24), structural=True)
    """Rows of the embedding and of the head."""
    hidden_size: int = width(4096)
    """Model width."""
    intermediate_size: int = width(11008)
    """Width inside the feed-forward block."""
    num_hidden_layers: int = layers(32)
    """Decoder layers."""
    num_attention_heads: int = layers(32)
    """Query heads."""
    num_key_value_heads: int | None = setting(None, optional(integer(1, MAX_LAYERS)), structural=True)
    """Key and value heads; None means as many as query heads."""
    head_dim: int | None = setting(None, optional(integer(2, MAX_WIDTH)), structural=True)
    """Width of a head; None means hidden_size / num_attention_heads."""
    hidden_act: str = setting("silu", choice("silu"), structural=True)
    """Activation of the gate."""
    max_position_embeddings: int = setting(2048, integer(1, 1 << 30))
    """Context length."""
    initializer_range: float = setting(0.02, number(0.0, 10.0))
    """Standard deviation of fresh weights."""
    rms_norm_eps: float = setting(1e-6, number(0.0, 1.0), structural=True)
    """Epsilon of the norms."""
    use_cache: bool = setting(True, boolean())
    """Whether forward returns past_key_values by default."""
    tie_word_embeddings: bool = setting(False, boolean(), structural=True)
    """Whether the head is the embedding."""
    rope_theta: float = setting(10000.0, number(1.0, 1e12), structural=True)
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = setting(None, _rope_scaling, structural=True)
    """Scaling of the rotary frequencies: type linear or dynamic with a factor, or llama3 with its four numbers; None leaves them."""
    pad_token_id: int | None = setting(None, optional(integer(0)))
    """Token whose embedding gets no gradient; None pads with nothing in particular."""
    bos_token_id: int | None = setting(1, optional(integer(0)))
    """First token of a prompt."""
    eos_token_id: int | list[int] | None = setting(2, _token_ids)
    """Token or tokens that end an answer."""
    attention_bias: bool = setting(False, boolean(), structural=True)
    """Biases of all four attention projections (none in Meta's models)."""
    mlp_bias: bool = setting(False, boolean(), structural=True)
    """Biases of the feed-forward block (none in Meta's models)."""
    pretraining_tp: int = setting(1, integer(1, 1024))
    """Slices of the original training's tensor parallelism: above 1 the row-parallel products are rounded slice by slice as there."""

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads, resolved."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head, resolved."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    @property
    def window(self) -> int | None:
        """Positions that a token sees, itself included; None sees all before it."""
        return None

    @property
    def context_len(self) -> int:
        """Positions that the model was made for, stretched by linear scaling.

        Dynamic scaling does not count: with it a token's logits would depend on how long its row has become.
        """
        length = self.max_position_embeddings
        if self.rope_scaling is not None and self.rope_scaling.get("type") == "linear":
            length = int(length * self.rope_scaling["factor"])
        return length

    def end_ids(self) -> tuple[int, ...]:
        """Return eos_token_id as ids."""
        ends = self.eos_token_id
        return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)

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
        if self.rope_scaling is not None and self.head_width < 4:
            raise ConfigError(f"rope_scaling needs heads of width 4 or more, got {self.head_width}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                f"pad_token_id must be below vocab_size {self.vocab_size}, got {self.pad_token_id}; resize the embedding first"
            )

    @classmethod
    def normalize(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Read either form of the rotary settings: rope_theta + rope_scaling (4.x) or rope_parameters (5.x)."""
        values = super().normalize(values)
        parameters = values.pop("rope_parameters", None)
        if parameters is not None:
            if not isinstance(parameters, Mapping):
                raise ConfigError(f"rope_parameters must be a table, got {parameters!r}")
            if parameters.get("rope_theta") is not None:
                values["rope_theta"] = parameters["rope_theta"]
            if parameters.get("partial_rotary_factor") not in (None, 1.0):
                raise ConfigError("rope_parameters['partial_rotary_factor'] must be 1.0; rotating part of a head is not supported")
            values["rope_scaling"] = _rope_scaling("rope_parameters", parameters)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Write rope_theta and rope_scaling for transformers 4.x and rope_parameters for 5.x."""
        values = super().to_dict()
        if self.head_dim is None:
            del values["head_dim"]  # transformers' Qwen2 takes a null for a width
        scaling = {"type": "default"} if self.rope_scaling is None else dict(self.rope_scaling)
        if "type" in scaling:
            scaling["rope_type"] = scaling.pop("type")
        return {**values, "rope_parameters": {"rope_theta": self.rope_theta, **scaling}}


@dataclass(kw_only=True, eq=False, init=False)
class MistralConfig(LlamaConfig):
    """A Mistral decoder: Llama's with a window."""

    model_type: ClassVar[str] = "mistral"

    intermediate_size: int = width(14336)
    num_key_value_heads: int | None = setting(8, optional(integer(1, MAX_LAYERS)), structural=True)
    max_position_embeddings: int = setting(131072, integer(1, 1 << 30))
    sliding_window: int | None = setting(4096, optional(integer(1, 1 << 30)), structural=True)
    """Positions that a token sees, itself included; null in later Mistral models."""

    @property
    def window(self) -> int | None:
        """Positions that a token sees, itself included; None sees all before it."""
        return self.sliding_window


@dataclass(kw_only=True, eq=False, init=False)
class Qwen2Config(LlamaConfig):
    """A Qwen-1.5 or Qwen-2 decoder: Llama's with biases on queries, keys and values."""

    model_type: ClassVar[str] = "qwen2"

    vocab_size: int = setting(151936, integer(1, 1 << 24), structural=True)
    intermediate_size: int = width(22016)
    num_key_value_heads: int | None = setting(32, optional(integer(1, MAX_LAYERS)), structural=True)
    max_position_embeddings: int = setting(32768, integer(1, 1 << 30))
    bos_token_id: int | None = setting(None, optional(integer(0)))
    eos_token_id: int | list[int] | None = setting(None, _token_ids)
    use_sliding_window: bool = setting(False, choice(False), structural=True)
    """Windows in the upper layers; no published LLaVA uses them, and they are not run."""

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return True


DECODERS: Mapping[str, type[LlamaConfig]] = {cls.model_type: cls for cls in (LlamaConfig, MistralConfig, Qwen2Config)}
"""Decoder configurations by model_type."""
