"""LLaVA's configurations: LlavaConfig (v1, v1.5, interleave) and LlavaNextConfig (v1.6), as config.json holds them.

Owns: both classes, and both forms of file: nested (transformers: text_config, vision_config) and flat (original LLaVA: the language
model's keys beside mm_* keys). from_dict reads either, to_dict writes the nested, to_original_dict the flat form.
Refuses: torch. Defaults are transformers' (files omit fields that have them).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

from llavakit.config import ModelConfig, boolean, choice, integer, optional, setting
from llavakit.errors import ConfigError
from llavakit.geometry import ImageGrid, MergeType, patch_grid
from llavakit.model.config import DECODERS, MAX_LAYERS, ForwardConfig, LlamaConfig
from llavakit.model.vision_config import TOWERS, ClipVisionConfig, VisionConfig

__all__ = ["DEFAULT_PINPOINTS", "LlavaConfig", "LlavaNextConfig", "published_tower"]

_C = TypeVar("_C", bound=ModelConfig)
DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""LLaVA-1.6's sizes; transformers reads them as (height, width), the original as (width, height)."""
_FLAT_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""model_type of flat files -> that of their language model."""
_FLAT_KEYS = ("mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "use_mm_proj", "hidden_size", "num_hidden_layers")
"""Keys by which the flat form is known where there is no text_config."""
_NEVER_NULL = ("mm_hidden_size", "mm_vision_tower", "vision_config")
"""Keys whose null is their absence."""
_USUAL_TOWER = "openai/clip-vit-large-patch14-336"
_FEATURES = {"patch": "default", "cls_patch": "full"}
"""mm_vision_select_feature -> vision_feature_select_strategy."""
_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14": {"image_size": 224},
    "openai/clip-vit-large-patch14-336": {},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
"""Towers that flat files only name, by their difference from the defaults."""


def published_tower(name: str) -> VisionConfig:
    """Return the configuration of a published tower by its hub id, or by a path that ends in its name.

    Raises: ConfigError for an unknown one.
    """
    last = name.rstrip("/").rpartition("/")[2]
    name = next((known for known in _TOWERS if known.rpartition("/")[2] == last), name)
    if name not in _TOWERS:
        raise ConfigError(f"mm_vision_tower {name!r} is not one of the known towers ({', '.join(_TOWERS)}); give its vision_config")
    return _part("vision_config", _TOWERS[name], TOWERS, ClipVisionConfig)


def _part(name: str, value: object, classes: Mapping[str, type[Any]], default: type[_C]) -> _C:
    if isinstance(value, tuple(classes.values())):
        return cast(_C, value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a {default.__name__} or a table, got {value!r}")
    kind = value.get("model_type", default.model_type)
    if not isinstance(kind, str) or kind not in classes:
        raise ConfigError(f"{name} has model_type {kind!r}; supported are {', '.join(classes)}")
    return cast(_C, classes[kind].from_dict(value))


def _text_config(name: str, value: object) -> LlamaConfig:
    return _part(name, value, DECODERS, LlamaConfig)


def _vision_config(name: str, value: object) -> VisionConfig:
    return _part(name, value, TOWERS, ClipVisionConfig)


def _feature_layer(name: str, value: object) -> int | list[int]:
    check = integer(-MAX_LAYERS, MAX_LAYERS)
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError(f"{name} must name at least one hidden state, got {value!r}")
        return [check(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return cast(int, check(name, value))


def _projector_type(name: str, value: object) -> str:
    if not isinstance(value, str) or re.fullmatch(r"mlp[1-9]\d?x_gelu|linear|identity", value) is None:
        raise ConfigError(f"{name} must be linear, identity or mlpNx_gelu with N from 1 to 99, got {value!r}")
    return value


def _pinpoints(name: str, value: object) -> list[list[int]]:
    check = integer(1, 1 << 14)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise ConfigError(f"{name} must be a list of (height, width) pairs, got {value!r}")
    return [[check(name, side) for side in pair] for pair in value]


@dataclass(kw_only=True, eq=False, init=False)
class LlavaConfig(ForwardConfig):
    """LLaVA: a tower, a projector and a decoder; each picture is one tile."""

    model_type: ClassVar[str] = "llava"

    text_config: LlamaConfig = setting(LlamaConfig, _text_config, structural=True)
    """The language model: a LlamaConfig, MistralConfig or Qwen2Config."""
    vision_config: VisionConfig = setting(ClipVisionConfig, _vision_config, structural=True)
    """The tower: a ClipVisionConfig or SiglipVisionConfig."""
    image_token_index: int | None = setting(32000, optional(integer(0)))
    """Id of the positions that hold image features; None where only -200 stands for a picture (original LLaVA)."""
    projector_hidden_act: str = setting("gelu", choice("gelu"), structural=True)
    """Activation between the projector's layers, exact gelu."""
    mm_projector_type: str = setting("mlp2x_gelu", _projector_type, structural=True)
    """mlpNx_gelu with N linear layers; linear (v1) is one of them; identity hands the tower's features on."""
    multimodal_projector_bias: bool = setting(True, boolean(), structural=True)
    """Whether the projector's layers have biases."""
    vision_feature_layer: int | list[int] = setting(-2, _feature_layer, structural=True)
    """Which of the tower's hidden states are the features, several side by side; 0 is the embedding, negative counts from the end."""
    vision_feature_select_strategy: str = setting("default", choice("default", "full"), structural=True)
    """default drops the class token where there is one, full keeps it."""
    tie_word_embeddings: bool = setting(False, boolean(), structural=True)
    """Whether the head is the embedding; text_config says so too."""
    pad_token_id: int | None = setting(None, optional(integer(0)))
    """Padding of batches."""
    ignore_index: int = setting(-100, choice(-100))
    """Label of positions without loss."""
    tokenizer_padding_side: str = setting("right", choice("right", "left"))
    """Where rows are filled up whose placeholders became features."""
    tokenizer_model_max_length: int | None = setting(None, optional(integer(1)))
    """Positions of a row at most, features counted."""

    @property
    def projector_depth(self) -> int:
        """Linear layers of the projector."""
        match self.mm_projector_type:
            case "identity":
                return 0
            case "linear":
                return 1
        return int(self.mm_projector_type.removeprefix("mlp").removesuffix("x_gelu"))

    @property
    def feature_depths(self) -> tuple[int, ...]:
        """The hidden states that are the features, counted from the embedding."""
        chosen = self.vision_feature_layer if isinstance(self.vision_feature_layer, list) else [self.vision_feature_layer]
        return tuple(layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer for layer in chosen)

    @property
    def feature_width(self) -> int:
        """Width of a feature before the projector."""
        return self.vision_config.hidden_size * len(self.feature_depths)

    @property
    def image_grid(self) -> ImageGrid:
        """The image tokens of one tile."""
        has_cls = self.vision_config.has_cls and self.vision_feature_select_strategy == "full"
        return patch_grid(self.vision_config.image_size, self.vision_config.patch_size, has_cls=has_cls)

    @property
    def merge(self) -> MergeType | None:
        """How a picture's tiles are put together; None where every picture is one tile."""
        return None

    @property
    def has_newline(self) -> bool:
        """Whether rows of features end with a feature of their own."""
        return self.merge == "spatial_unpad"

    def get_text_config(self) -> LlamaConfig:
        """Return the language model's config."""
        return self.text_config

    def validate(self) -> None:
        """Check the parts, and that they fit each other. Raises: ConfigError."""
        self.text_config.validate()
        self.vision_config.validate()
        num_states = self.vision_config.num_hidden_layers + 1
        if not all(0 <= depth < num_states for depth in self.feature_depths):
            raise ConfigError(f"vision_feature_layer {self.vision_feature_layer} must name one of the tower's {num_states} hidden states")
        if self.tie_word_embeddings and not self.text_config.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings is set for LLaVA but not in its text_config; set both or neither")
        stated = self.to_dict().get("mm_hidden_size", self.feature_width)
        if stated != self.feature_width:
            raise ConfigError(f"mm_hidden_size is {stated}, but the tower's features are {self.feature_width} wide")
        if self.mm_projector_type == "identity" and self.feature_width != self.text_config.hidden_size:
            raise ConfigError(
                f"mm_projector_type identity needs features as wide as the language model ({self.text_config.hidden_size}), "
                f"got {self.feature_width}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read config.json in either form; a v1.6 file gives a LlavaNextConfig. Raises: ConfigError."""
        values = cls.normalize(values)
        if cls is LlavaConfig and values.get("model_type") == LlavaNextConfig.model_type:
            return cast(Self, LlavaNextConfig.from_dict(values))
        return super().from_dict(values)

    @classmethod
    def normalize(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Read the flat form, 5.x's image_token_id, and tied weights that are only said to be at the top."""
        values = super().normalize({name: value for name, value in values.items() if value is not None or name not in _NEVER_NULL})
        values = _nested(values) if _is_flat(values) else values
        if "image_token_id" in values:
            values.setdefault("image_token_index", values["image_token_id"])
            del values["image_token_id"]
        text = values.get("text_config")
        if values.get("tie_word_embeddings") and isinstance(text, Mapping | None):
            values["text_config"] = {**({} if text is None else text), "tie_word_embeddings": True}
        return values

    def to_dict(self) -> dict[str, Any]:
        """Write what transformers reads; the projector's type only where it is not the usual one."""
        values = super().to_dict()
        values["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        values["image_seq_length"] = self.image_grid.rows * self.image_grid.cols + int(self.image_grid.has_cls)
        if self.mm_projector_type == "mlp2x_gelu":
            del values["mm_projector_type"]
        usual = {"tokenizer_padding_side": "right", "tokenizer_model_max_length": None}
        return {name: value for name, value in values.items() if name not in usual or value != usual[name]}

    def to_original_dict(self) -> dict[str, Any]:
        """Write the flat form that original LLaVA reads, in which a tower is named. One that nobody published is described as well.

        Raises: ConfigError where the form cannot say it: several feature layers, a projector without biases.
        """
        if isinstance(self.vision_feature_layer, list) or not self.multimodal_projector_bias:
            raise ConfigError("original LLaVA's config.json cannot hold several feature layers or a projector without biases; use to_dict")
        own = {field.name for field in dataclasses.fields(self)} | {"image_seq_length", "architectures", "mm_patch_merge_type"}
        text = self.text_config.to_dict()
        del text["rope_parameters"]
        kept = {name: value for name, value in self.to_dict().items() if name not in own and name not in text}
        features = {strategy: feature for feature, strategy in _FEATURES.items()}
        return {
            **text,
            "model_type": next(flat for flat, decoder in _FLAT_DECODERS.items() if decoder == self.text_config.model_type),
            "architectures": [f"Llava{_CLASS_PARTS[self.text_config.model_type]}ForCausalLM"],
            "mm_hidden_size": self.vision_config.hidden_size,
            "mm_projector_type": self.mm_projector_type,
            "mm_vision_select_layer": self.vision_feature_layer,
            "mm_vision_select_feature": features[self.vision_feature_select_strategy] if self.vision_config.has_cls else "patch",
            **self._tower_keys(kept.get("mm_vision_tower")),
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "use_mm_proj": True,
            **self._anyres_keys(),
            **kept,
            "pad_token_id": self.pad_token_id,
            "tokenizer_padding_side": self.tokenizer_padding_side,
            **({} if (most := self.tokenizer_model_max_length) is None else {"tokenizer_model_max_length": most}),
        }

    def _anyres_keys(self) -> dict[str, Any]:
        return {}

    def _tower_keys(self, stated: object) -> dict[str, Any]:
        described = self.vision_config.to_dict()
        shape = {name: value for name, value in described.items() if name in _TOWER_SHAPE}
        for name in _TOWERS:
            if {key: value for key, value in published_tower(name).to_dict().items() if key in _TOWER_SHAPE} == shape:
                return {"mm_vision_tower": name if stated is None else stated}
        return {"mm_vision_tower": "unpublished" if stated is None else stated, "vision_config": described}


@dataclass(kw_only=True, eq=False, init=False)
class LlavaNextConfig(LlavaConfig):
    """LLaVA-1.6: pictures of any size become a base tile and several more (anyres)."""

    model_type: ClassVar[str] = "llava_next"

    image_grid_pinpoints: list[list[int]] = setting(lambda: [list(pair) for pair in DEFAULT_PINPOINTS], _pinpoints)
    """Sizes to cut pictures to, as (height, width); the first of equally good ones is taken."""
    mm_patch_merge_type: str = setting("spatial_unpad", choice("flat", "spatial", "spatial_unpad"), structural=True)
    """How the tiles' features are put together; only spatial_unpad has newline features."""

    @property
    def merge(self) -> MergeType | None:
        """How a picture's tiles are put together."""
        return cast(MergeType, self.mm_patch_merge_type)

    def validate(self) -> None:
        """Check that areas of patches can be put together. Raises: ConfigError."""
        super().validate()
        side = self.vision_config.image_size
        if self.image_grid.has_cls and self.mm_patch_merge_type != "flat":
            raise ConfigError("vision_feature_select_strategy 'full' keeps class tokens, which have no place in an area of patches")
        if any(length % side for pair in self.image_grid_pinpoints for length in pair):
            raise ConfigError(f"image_grid_pinpoints must be multiples of image_size {side}, got {self.image_grid_pinpoints}")

    def to_dict(self) -> dict[str, Any]:
        """Write what transformers reads; the merge type only where it is not the usual one."""
        values = super().to_dict()
        if self.mm_patch_merge_type == "spatial_unpad":
            del values["mm_patch_merge_type"]
        return values

    def _anyres_keys(self) -> dict[str, Any]:
        pinpoints = [[width, height] for height, width in self.image_grid_pinpoints]
        return {"image_aspect_ratio": "anyres", "mm_patch_merge_type": self.mm_patch_merge_type, "image_grid_pinpoints": pinpoints}


_CLASS_PARTS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}
_TOWER_SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def _is_flat(values: Mapping[str, Any]) -> bool:
    """Whether a file is original LLaVA's: it describes the language model beside the rest, or is of its own type."""
    if values.get("text_config") is not None or values.get("model_type") == LlavaNextConfig.model_type:
        return False
    is_named = str(values.get("model_type")).startswith("llava_")
    return is_named or ("vision_config" not in values and any(key in values for key in _FLAT_KEYS)) or "mm_vision_tower" in values


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn original LLaVA's flat form into the nested one; keys that neither form knows stay at the top."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _FLAT_DECODERS:
        raise ConfigError(f"model_type {kind!r} is no original LLaVA that is supported; supported are {', '.join(_FLAT_DECODERS)}")
    decoder = DECODERS[_FLAT_DECODERS[kind]]
    text_names = {field.name for field in dataclasses.fields(decoder)} | {"rope_parameters"}
    rest = {name: value for name, value in values.items() if name not in text_names}
    text = {name: value for name, value in values.items() if name in text_names}

    def take(name: str, default: Any) -> Any:
        value = rest.pop(name, None)
        return default if value is None else value

    feature = take("mm_vision_select_feature", "patch")
    if not isinstance(feature, str) or feature not in _FEATURES:
        raise ConfigError(f"mm_vision_select_feature must be one of {', '.join(_FEATURES)}, got {feature!r}")
    nested = {
        "model_type": LlavaConfig.model_type,
        "text_config": {"model_type": decoder.model_type, **text},
        "mm_projector_type": take("mm_projector_type", "linear"),
        "vision_feature_layer": take("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _FEATURES[feature],
        "image_token_index": None,
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "pad_token_id": text.get("pad_token_id"),
    }
    if rest.get("s2"):
        raise ConfigError("s2 (pictures seen at several scales) is not supported")
    tower = _vision_config("vision_config", rest["vision_config"]) if "vision_config" in rest else _named_tower(rest)
    nested["vision_config"] = tower
    rest.setdefault("mm_use_im_patch_token", True)  # what original LLaVA takes an absent key for
    if rest.get("image_aspect_ratio") == "anyres":
        nested |= {"model_type": LlavaNextConfig.model_type, "mm_patch_merge_type": take("mm_patch_merge_type", "flat")}
        pinpoints = _original_pinpoints(take("image_grid_pinpoints", [list(pair) for pair in DEFAULT_PINPOINTS]), tower.image_size)
        nested["image_grid_pinpoints"] = [[height, width] for width, height in pinpoints]
    return {**rest, **nested}


def _named_tower(values: Mapping[str, Any]) -> VisionConfig:
    name = values.get("mm_vision_tower", _USUAL_TOWER)
    if not isinstance(name, str):
        raise ConfigError(f"mm_vision_tower must be the name of a tower, got {name!r}")
    return published_tower(_USUAL_TOWER if name == "" else name)


def _original_pinpoints(value: object, side: int) -> list[list[int]]:
    """Read a list of (width, height) pairs, or that list as text, or the first and last grid of tiles of that side: (1x1),...,(6x6)."""
    if not isinstance(value, str):
        return _pinpoints("image_grid_pinpoints", value)
    grids = re.findall(r"\((\d{1,2})x(\d{1,2})\)", value)
    if grids:
        (first_cols, first_rows), (last_cols, last_rows) = ((int(cols), int(rows)) for cols, rows in (grids[0], grids[-1]))
        value = [(cols * side, rows * side) for cols in range(first_cols, last_cols + 1) for rows in range(first_rows, last_rows + 1)]
    elif re.fullmatch(r"[\[(]\s*([\[(]\s*\d{1,5}\s*,\s*\d{1,5}\s*[\])]\s*(,\s*)?)+[\])]", value):
        numbers = [int(number) for number in re.findall(r"\d+", value)]
        value = list(zip(numbers[::2], numbers[1::2], strict=True))
    else:
        raise ConfigError(f"image_grid_pinpoints must be [(width, height), ...] or (1x1),...,(6x6), got {value[:100]!r}")
    return _pinpoints("image_grid_pinpoints", value)
