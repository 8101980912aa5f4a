"""LlavaProcessor: a conversation becomes a Prompt that any part of the system can run or train on.

Owns: Prompt and its invariant, expansion of pictures, length checks, loading and saving of the processor's files.
Thread-safe: nothing is changed after construction.
Legend: N tiles  S side in pixels
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from llavakit.errors import CheckpointError, PromptError
from llavakit.geometry import ImageGrid, num_image_tokens, patch_grid
from llavakit.processing.chat import TEMPLATES, ChatTemplate, encode_segments, jinja_text
from llavakit.processing.image import DEFAULT_LIMITS, ImageLimits, ImageProcessor, decode_image, image_digest
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.documents import read_json, read_optional_json, write_json
from llavakit.types import Conversation

__all__ = ["LlavaProcessor", "Prompt"]

_TEMPLATE_KEY = "llavakit_template"
_NO_TILES = (0, 3, 1, 1)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sequence ready to run: image slots in ids equal the sum of num_image_tokens over grids."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    tiles_N3SS: Tensor
    grids: tuple[ImageGrid, ...] = ()
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LlavaProcessor:
    """Tokenizer, image processor and chat template of one checkpoint."""

    tokenizer: LlamaTokenizer
    image_processor: ImageProcessor
    template: ChatTemplate
    image_token_id: int
    patch_size: int
    keep_cls: bool = False
    limits: ImageLimits = field(default=DEFAULT_LIMITS)

    @functools.cached_property
    def grid(self) -> ImageGrid:
        """The image tokens of one picture."""
        return patch_grid(self.image_processor.crop_px, self.patch_size, has_cls=self.keep_cls)

    def prompt(self, conversation: Conversation, *, add_generation_prompt: bool = True, max_len: int | None = None) -> Prompt:
        """Build the prompt of a conversation: decode its pictures, render the template, encode.

        Raises: ImageError, PromptError (also when the prompt exceeds max_len tokens; nothing is ever cut).
        """
        images = [decode_image(part.data, self.limits) for part in conversation.images]
        return self.prompt_of_images(conversation, images, add_generation_prompt=add_generation_prompt, max_len=max_len)

    def prompt_of_images(
        self, conversation: Conversation, images: Sequence[Image.Image], *, add_generation_prompt: bool, max_len: int | None = None
    ) -> Prompt:
        """Build the prompt from pictures that are decoded already, one per ImagePart of the conversation."""
        grids = (self.grid,) * len(images)
        encoded = encode_segments(
            self.template.segments(conversation, add_generation_prompt=add_generation_prompt),
            self._encode,
            bos_id=self.tokenizer.bos_token_id,
            eos_id=self.tokenizer.eos_token_id,
            image_id=self.image_token_id,
            slots=[num_image_tokens(grid) for grid in grids],
        )
        if max_len is not None and len(encoded.ids) > max_len:
            raise PromptError(
                f"the prompt has {len(encoded.ids)} tokens ({len(images)} pictures of {num_image_tokens(self.grid)}), "
                f"at most {max_len} fit; shorten the conversation"
            )
        tiles = torch.stack([self.image_processor.apply(image) for image in images]) if images else torch.empty(_NO_TILES)
        return Prompt(encoded.ids, encoded.loss_mask, tiles, grids, tuple(image_digest(image) for image in images))

    @functools.cached_property
    def _encode(self) -> Any:
        # Templates repeat a few long constant stretches (the system line above all).
        return functools.lru_cache(maxsize=4096)(self.tokenizer.encode_text)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load the processor's files from a llava-hf folder, in the 4.x or the 5.x arrangement. Raises: CheckpointError."""
        folder = Path(folder)
        config, processor = read_json(folder / "config.json"), read_optional_json(folder / "processor_config.json")
        image = processor.get("image_processor") or read_optional_json(folder / "preprocessor_config.json")
        if not image:
            raise CheckpointError(f"{folder} has neither preprocessor_config.json nor an image_processor in processor_config.json")
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        vision = config.get("vision_config", {})
        patch = processor.get("patch_size") or vision.get("patch_size", 14)
        image_id = config.get("image_token_index", config.get("image_token_id", 32000))
        return cls(
            tokenizer=tokenizer,
            image_processor=ImageProcessor.from_dict(image),
            template=_find_template(folder, processor),
            image_token_id=int(image_id),
            patch_size=int(patch),
            keep_cls=config.get("vision_feature_select_strategy", "default") == "full",
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all files of the processor, complete for us and for transformers 4.46+ and 5.x."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", self.image_processor.to_dict())
        strategy = "full" if self.keep_cls else "default"
        values = {
            "processor_class": "LlavaProcessor",
            "image_token": self.tokenizer.convert_ids_to_tokens(self.image_token_id),
            "num_additional_image_tokens": 1,
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": strategy,
            _TEMPLATE_KEY: self.template.name,
        }
        write_json(folder / "processor_config.json", values)
        if self.template.name != "plain":
            text = jinja_text(self.template)
            (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
            write_json(folder / "chat_template.json", {"chat_template": text})


def _find_template(folder: Path, processor: dict[str, Any]) -> ChatTemplate:
    """Choose the template from content: our own key, else v1 with the system line only where the folder has no template of its own."""
    name = processor.get(_TEMPLATE_KEY)
    if name is not None:
        if name not in TEMPLATES:
            raise CheckpointError(f"processor_config.json names the template {name!r}; known are {', '.join(TEMPLATES)}")
        return TEMPLATES[name]
    has_own = any((folder / file).is_file() for file in ("chat_template.jinja", "chat_template.json"))
    return TEMPLATES["v1_hf" if has_own else "v1"]
