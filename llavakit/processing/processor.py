"""LlavaProcessor: a conversation becomes a Prompt that any part of the system can run or train on.

Owns: Prompt and its invariant, expansion of pictures, checks of length and cost, loading and saving of the processor's files.
Refuses: cutting prompts; files, URLs.
Invariant: everything that can be refused from headers and lengths is refused before a pixel is decoded.
Thread-safe: what a prompt becomes depends on the conversation alone; the memo only saves time.
Legend: N tiles  S side in pixels  B rows  T tokens
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Unpack

import torch
from PIL import Image
from torch import Tensor

from llavakit.errors import CheckpointError, ImageError, LengthError, PromptError
from llavakit.geometry import ImageGrid, num_image_tokens, num_tiles, patch_grid
from llavakit.processing.chat import ChatTemplate, Turns
from llavakit.processing.decode import DEFAULT_LIMITS, ImageLimits, decode_image, image_digest, image_size
from llavakit.processing.image import ImageProcessor
from llavakit.processing.jinja import jinja_text
from llavakit.processing.segments import EncodedChat, MarkerIds, Segment, encode_segments, find_marker
from llavakit.processing.template_choice import TEMPLATE_KEY, is_vision_config, template_of_checkpoint, trained_template, was_trained_padded
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.storage.documents import json_bytes, read_optional_json
from llavakit.storage.hub import HubArguments, resolve_model
from llavakit.types import Conversation

__all__ = ["LlavaProcessor", "Prompt"]

_T = TypeVar("_T")
_CROPPED = "the checkpoint's files crop the middle square of a picture, but LLaVA-1.5 was trained on pictures padded to a square"
_MEMO_TEXTS = 1024
_MARKS_KEY = "llavakit_image_marks"
"""Our own entry in processor_config.json."""
_MEMO_CHARACTERS = 512  # the system line and other constant stretches are shorter


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One sequence ready to run: image slots in ids equal the sum of num_image_tokens over grids."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """Of each id whether a model learns to produce it."""
    tiles_N3SS: Tensor
    """float32; N = 0 without pictures."""
    grids: tuple[ImageGrid, ...] = ()
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a caller wants of a conversation."""

    conversation: Conversation
    add_generation_prompt: bool
    supervise: bool
    max_len: int | None


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The ids of a conversation, made for these pictures."""

    chat: EncodedChat
    grids: tuple[ImageGrid, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class LlavaProcessor:
    """Tokenizer, image processor and chat template of one checkpoint."""

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    template: ChatTemplate
    image_token_id: int
    patch_size: int
    keep_cls: bool = False
    """Whether the tower's class token takes a place in the prompt too (strategy "full")."""
    has_cls: bool = True
    """Whether the tower has a class token at all (CLIP has, SigLIP has not)."""
    image_marks: tuple[str, str] | None = None
    """Special tokens before and after each picture, where the weights were trained with them (LLaVA v1's mm_use_im_start_end)."""
    limits: ImageLimits = DEFAULT_LIMITS
    is_faithful: bool = False
    """Decode pictures as original LLaVA does (no rotation, transparency dropped), as evaluation wants it."""
    preprocessing_note: str | None = None
    """What the files do to pictures that training did not, in one line; None where they agree."""
    _memo: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def tile_grid(self) -> ImageGrid:
        """The image tokens of one tile."""
        return patch_grid(self.image_processor.crop_px, self.patch_size, has_cls=self.has_cls and self.keep_cls)

    @functools.cached_property
    def markers(self) -> MarkerIds:
        """The ids of the template's markers. Raises: CheckpointError where the tokenizer lacks one."""
        markers = self.template.markers(self.tokenizer, self.image_token_id)
        if self.image_marks is None:
            return markers
        before, after = (find_marker(self.tokenizer, mark, self.template.name) for mark in self.image_marks)
        return replace(markers, around_image=(before, after))

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's eos and the template's end tokens."""
        return self.template.end_ids(self.markers)

    def prompt(
        self, conversation: Conversation, *, add_generation_prompt: bool = True, supervise: bool = False, max_len: int | None = None
    ) -> Prompt:
        """Build the prompt of a conversation: render the template, encode, decode its pictures.

        With supervise the conversation is a training sample, in which something must be left to learn.
        Raises: ImageError; PromptError, also when the prompt exceeds max_len tokens (nothing is ever cut).
        """
        ask, parts = _Ask(conversation, add_generation_prompt, supervise, max_len), conversation.images
        if self.image_processor.aspect != "anyres":
            encoded = self._encode(ask, (self.tile_grid,) * len(parts))
        sizes = [image_size(part.data, self.limits, faithful=self.is_faithful) for part in parts]
        self._check_pixels(sizes)
        if self.image_processor.aspect == "anyres":
            encoded = self._encode(ask, self.grids(sizes))
        images = [decode_image(part.data, self.limits, faithful=self.is_faithful) for part in parts]
        # A header may not tell of a rotation that stands behind the pixels.
        if self.image_processor.aspect == "anyres" and (actual := [image.size for image in images]) != sizes:
            encoded = self._encode(ask, self.grids(actual))
        return self._assemble(encoded, images)

    def answered(self, conversation: Conversation, asked: Prompt) -> Prompt:
        """Build the prompt of a conversation after its answer; its pictures are those of asked, the prompt before the answer."""
        encoded = self.encode_chat(conversation, asked.grids, add_generation_prompt=False)[1]
        return replace(asked, ids=encoded.ids, loss_mask=encoded.loss_mask)

    def check_image(self, data: bytes) -> None:
        """Decode a picture as prompt() would. Raises: ImageError for one that cannot be used."""
        self._check_pixels([image_size(data, self.limits, faithful=self.is_faithful)])
        decode_image(data, self.limits, faithful=self.is_faithful)

    def prompt_of_images(
        self,
        conversation: Conversation,
        images: Sequence[Image.Image],
        *,
        add_generation_prompt: bool = True,
        supervise: bool = False,
        max_len: int | None = None,
    ) -> Prompt:
        """Build the prompt from RGB pictures that are decoded already; the conversation's ImageParts only mark their places.

        Raises: as prompt(), and PromptError when the counts differ.
        """
        if len(images) != len(conversation.images):
            raise PromptError(f"the conversation has places for {len(conversation.images)} pictures, got {len(images)}")
        ask = _Ask(conversation, add_generation_prompt, supervise, max_len)
        return self._assemble(self._encode(ask, self.grids([image.size for image in images])), images)

    def grids(self, sizes: Sequence[tuple[int, int]]) -> list[ImageGrid]:
        """Return the image tokens of pictures of these widths and heights."""
        return [self.image_processor.grid(size, self.tile_grid) for size in sizes]

    def tile_bytes(self, grids: Sequence[ImageGrid]) -> int:
        """Count the bytes of pictures' tiles, as prompts hold them: float32, three channels."""
        return sum(map(num_tiles, grids)) * 3 * 4 * self.image_processor.crop_px**2

    def encode_chat(
        self, conversation: Conversation, grids: Sequence[ImageGrid], *, add_generation_prompt: bool = True
    ) -> tuple[list[Segment], EncodedChat]:
        """Build a conversation's segments and their ids, its pictures as grids; none is opened. Raises: PromptError."""
        segments = self.template.segments(conversation, add_generation_prompt=add_generation_prompt)
        return segments, encode_segments(segments, self._encode_text, self.markers, map(num_image_tokens, grids))

    def __call__(
        self,
        images: Image.Image | bytes | Sequence[Image.Image | bytes] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool = False,
        return_tensors: Literal["pt"] = "pt",
    ) -> dict[str, Tensor]:
        """Encode texts in which the caller wrote the template and <image> himself, as transformers' LlavaProcessor does.

        Returns input_ids and attention_mask [B, T] and, with pictures, pixel_values in the order of the marks: [N, 3, S, S], or with
        anyres [N, most tiles, 3, S, S], filled up with zeros, and image_sizes [N, 2] as (height, width).
        Special tokens in the text mean themselves: give it your own text, and a user's words to prompt().
        Raises: ImageError; PromptError when marks and pictures differ in number; InputError when rows need padding.
        """
        if text is None or return_tensors != "pt":
            raise PromptError(f'text is needed, and return_tensors must be "pt", got {return_tensors!r}')
        texts = [text] if isinstance(text, str) else list(text)
        listed = [] if images is None else [images] if isinstance(images, Image.Image | bytes) else list(images)
        mark = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if (num_marks := sum(item.count(mark) for item in texts)) != len(listed):
            raise PromptError(f"the text has {num_marks} {mark} marks and there are {len(listed)} pictures; each picture needs one mark")
        sizes = [image_size(item, self.limits, faithful=self.is_faithful) if isinstance(item, bytes) else item.size for item in listed]
        self._check_pixels(sizes)
        pictures = [decode_image(item, self.limits, faithful=self.is_faithful) if isinstance(item, bytes) else item for item in listed]
        counts = iter([num_image_tokens(grid) for grid in self.grids([picture.size for picture in pictures])])
        expanded = ["".join(mark * next(counts) if part == mark else part for part in _split_marks(item, mark)) for item in texts]
        return {**self.tokenizer(expanded, padding=padding, return_tensors="pt"), **self._pixel_values(pictures)}

    def _pixel_values(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        if not pictures:
            return {}
        tiles = [self.image_processor.apply(picture) for picture in pictures]
        if self.image_processor.aspect != "anyres":
            return {"pixel_values": torch.cat(tiles)}
        sizes = torch.tensor([(picture.height, picture.width) for picture in pictures])
        return {"pixel_values": torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True), "image_sizes": sizes}

    def _check_pixels(self, sizes: Sequence[tuple[int, int]]) -> None:
        if (num_pixels := sum(width * height for width, height in sizes)) > (most := self.limits.max_total_pixels):
            raise ImageError(f"the pictures have {num_pixels} pixels together, at most {most} are allowed; scale them down")

    def _encode(self, ask: _Ask, grids: Sequence[ImageGrid]) -> _Encoded:
        slots = tuple(map(num_image_tokens, grids))
        encoded = self.encode_chat(ask.conversation, grids, add_generation_prompt=ask.add_generation_prompt)[1]
        assert encoded.ids.count(self.image_token_id) == sum(slots), "text must never encode to the image token"
        if ask.max_len is not None and len(encoded.ids) > ask.max_len:
            raise LengthError(
                f"the prompt has {len(encoded.ids)} tokens ({len(slots)} pictures of {', '.join(map(str, sorted(set(slots)))) or 0}), "
                f"at most {ask.max_len} fit; shorten the conversation"
            )
        if ask.supervise and not any(encoded.loss_mask):
            raise PromptError("the conversation has no answer to learn from; add the assistant's message")
        return _Encoded(encoded, tuple(grids))

    def _encode_text(self, text: str) -> tuple[int, ...]:
        # Templates repeat a few constant stretches, the system line above all.
        known = self._memo.get(text)
        if known is not None:
            return known
        ids = tuple(self.tokenizer.encode_text(text))
        if len(text) <= _MEMO_CHARACTERS and len(self._memo) < _MEMO_TEXTS:
            self._memo[text] = ids
        return ids

    def _assemble(self, encoded: _Encoded, images: Sequence[Image.Image]) -> Prompt:
        side = self.image_processor.crop_px
        tiles_N3SS = torch.cat([self.image_processor.apply(image) for image in images]) if images else torch.empty(0, 3, side, side)
        return Prompt(encoded.chat.ids, encoded.chat.loss_mask, tiles_N3SS, encoded.grids, tuple(map(image_digest, images)))

    @classmethod
    def from_pretrained(cls, model: str | Path, *, template: ChatTemplate | None = None, **hub: Unpack[HubArguments]) -> Self:
        """Load the processor's files from a llava-hf folder or hub id, in the 4.x or the 5.x arrangement.

        The template is the one that the folder's content tells, unless one is given. Raises: CheckpointError.
        """
        folder = resolve_model(model, parts="processor", **hub)
        config, processor = read_optional_json(folder / "config.json"), read_optional_json(folder / "processor_config.json")
        image = processor["image_processor"] if "image_processor" in processor else read_optional_json(folder / "preprocessor_config.json")
        if not image:
            hint = "; LLM makes the processor of an original LLaVA's folder, llava convert writes it" if is_vision_config(config) else ""
            raise CheckpointError(f"{folder} has neither preprocessor_config.json nor an image_processor in processor_config.json{hint}")
        tokenizer = load_tokenizer(folder)
        mark = _first(str, "<image>", (processor, "image_token"))
        known = tokenizer.find_token(mark)
        image_token_id = _first(int, -1 if known is None else known, (config, "image_token_index"), (config, "image_token_id"))
        if image_token_id not in tokenizer.added_tokens.values():
            raise CheckpointError(f"{folder}: image token {image_token_id} is not one of the tokenizer's added tokens; add it as {mark}")
        images, choice = ImageProcessor.from_dict(image), template_of_checkpoint(folder, named=template)
        vision = config.get("vision_config")
        vision = vision if isinstance(vision, Mapping) else {}
        patch_size = _first(int, 14, (processor, "patch_size"), (vision, "patch_size"))
        if not 1 <= patch_size <= images.crop_px:
            raise CheckpointError(f"{folder} states patch_size={patch_size}; from 1 to {images.crop_px} fit into a picture")
        is_padded = was_trained_padded(config, trained_template(choice))
        strategy = _first(str, "default", *((table, "vision_feature_select_strategy") for table in (config, processor)))
        return cls(
            tokenizer=tokenizer,
            image_processor=images,
            preprocessing_note=None if images.aspect != "crop" or not is_padded else _CROPPED,
            template=choice.template,
            image_token_id=image_token_id,
            patch_size=patch_size,
            keep_cls=strategy == "full",
            has_cls=_first(str, "clip_vision_model", (vision, "model_type")) == "clip_vision_model",
            image_marks=_read_marks(processor),
        )

    def files(self) -> dict[str, bytes]:
        """Build every file of the processor by name, complete for us and for transformers 4.46+ and 5.x."""
        values = {
            "processor_class": "LlavaNextProcessor" if self.image_processor.aspect == "anyres" else "LlavaProcessor",
            "image_token": self.tokenizer.convert_ids_to_tokens(self.image_token_id),
            "num_additional_image_tokens": int(self.has_cls),
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": "full" if self.keep_cls else "default",
            TEMPLATE_KEY: self.template.name,
            **({} if self.image_marks is None else {_MARKS_KEY: list(self.image_marks)}),
        }
        chat = _chat_files(self.template, self.image_marks) if isinstance(self.template.form, Turns) else {}
        return {
            **self.tokenizer.files(),
            "preprocessor_config.json": json_bytes(self.image_processor.to_dict()),
            "processor_config.json": json_bytes(values),
            **chat,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write files() into a folder, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (folder / name).write_bytes(data)


def _split_marks(text: str, mark: str) -> list[str]:
    """Cut a text around every mark; the marks are parts of their own."""
    parts = text.split(mark)
    return [part for text_part in parts[:-1] for part in (text_part, mark)] + parts[-1:]


def _read_marks(processor: Mapping[str, Any]) -> tuple[str, str] | None:
    match processor.get(_MARKS_KEY):
        case None:
            return None
        case [str(before), str(after)]:
            return before, after
        case marks:
            raise CheckpointError(f"processor_config.json has {_MARKS_KEY}={marks!r}; the tokens before and after a picture were expected")


def _chat_files(template: ChatTemplate, marks: tuple[str, str] | None) -> dict[str, bytes]:
    text = jinja_text(template, marks)
    return {"chat_template.jinja": text.encode(), "chat_template.json": json_bytes({"chat_template": text})}


def _first(kind: type[_T], default: _T, *places: tuple[Mapping[str, Any], str]) -> _T:
    """Return the first stated value; a null counts as absent. Raises: CheckpointError for a value of another type."""
    for table, name in places:
        value = table.get(name)
        if value is not None:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise CheckpointError(f"the checkpoint states {name}={value!r}; expected {kind.__name__}")
            return value
    return default
