"""LlavaProcessor: the prompt's invariants, refusals before any decoding, files."""

import dataclasses
import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llavakit.errors import CheckpointError, ImageError, InputError, PromptError
from llavakit.geometry import num_image_tokens
from llavakit.processing.decode import ImageLimits, decode_image
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.types import Conversation, TextPart
from tests.real_data import llama2_processor
from tests.tiny import IMAGE_TOKEN, tiny_processor


def picture(width: int = 40, height: int = 30, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


def test_slots_equal_the_grids_tokens() -> None:
    prompt = tiny_processor().prompt(Conversation.ask("compare", picture(), picture(9, 90)))
    assert prompt.ids.count(IMAGE_TOKEN) == sum(map(num_image_tokens, prompt.grids)) == 32
    assert prompt.tiles_N3SS.shape == (2, 3, 28, 28)
    assert len(set(prompt.digests)) == 2


def test_the_class_token_takes_a_place_where_it_is_kept() -> None:
    processor = dataclasses.replace(tiny_processor(), keep_cls=True)
    assert processor.prompt(Conversation.ask("what?", picture())).ids.count(IMAGE_TOKEN) == 17


def test_a_prompt_without_pictures_has_no_tiles() -> None:
    prompt = tiny_processor().prompt(Conversation.ask("hi"))
    assert prompt.tiles_N3SS.shape == (0, 3, 28, 28)
    assert (prompt.grids, prompt.digests) == ((), ())


def test_decoded_pictures_make_the_same_prompt() -> None:
    processor, data = tiny_processor(), picture()
    conversation = Conversation.ask("what?", data)
    prompt, other = processor.prompt(conversation), processor.prompt_of_images(conversation, [decode_image(data)])
    assert (prompt.ids, prompt.loss_mask, prompt.digests) == (other.ids, other.loss_mask, other.digests)
    assert torch.equal(prompt.tiles_N3SS, other.tiles_N3SS)


def test_pictures_and_places_must_agree() -> None:
    with pytest.raises(PromptError, match="places for 1 pictures, got 0"):
        tiny_processor().prompt_of_images(Conversation.ask("what?", picture()), [])


def test_long_prompts_are_refused_before_pictures_are_decoded() -> None:
    conversation = Conversation.ask("what?", b"no picture at all")
    with pytest.raises(PromptError, match=r"1 pictures of 16.*at most 20"):
        tiny_processor().prompt(conversation, max_len=20)
    with pytest.raises(ImageError):
        tiny_processor().prompt(conversation)


def test_the_length_limit_is_inclusive() -> None:
    processor, conversation = tiny_processor(), Conversation.ask("what?")
    length = len(processor.prompt(conversation).ids)
    assert len(processor.prompt(conversation, max_len=length).ids) == length
    with pytest.raises(PromptError):
        processor.prompt(conversation, max_len=length - 1)


def test_many_pixels_together_are_refused_a25() -> None:
    processor = dataclasses.replace(tiny_processor(), limits=ImageLimits(max_total_pixels=2000))
    assert processor.prompt(Conversation.ask("one", picture()))
    with pytest.raises(ImageError, match="2400 pixels together"):
        processor.prompt(Conversation.ask("two", picture(), picture()))


def test_the_same_picture_twice_has_the_same_digest_a29() -> None:
    first, second, third = (picture(), picture(), picture(colour=(1, 2, 3)))
    digests = tiny_processor().prompt(Conversation.ask("compare", first, second, third)).digests
    assert digests[0] == digests[1] != digests[2]


def test_a_training_sample_needs_an_answer() -> None:
    processor = tiny_processor()
    with pytest.raises(PromptError, match="no answer"):
        processor.prompt(Conversation.ask("what?"), add_generation_prompt=False, supervise=True)
    assert any(processor.prompt(Conversation.ask("what?").reply("a star"), add_generation_prompt=False, supervise=True).loss_mask)


def test_prompts_do_not_depend_on_what_came_before() -> None:
    used = tiny_processor()
    conversation = Conversation.ask("what?", picture()).reply("a star", TextPart("sure?"))
    for text in ("a", "b", "what?"):
        used.prompt(Conversation.ask(text))
    assert used.prompt(conversation).ids == used.prompt(conversation).ids == tiny_processor().prompt(conversation).ids


def test_processors_travel_to_worker_processes() -> None:
    processor = tiny_processor()
    conversation = Conversation.ask("what?", picture())
    tokenizer = pickle.loads(pickle.dumps(processor.tokenizer))
    assert dataclasses.replace(processor, tokenizer=tokenizer).prompt(conversation).ids == processor.prompt(conversation).ids


def test_a_conversation_of_150_tokens_takes_less_than_a_millisecond() -> None:
    processor = llama2_processor()
    conversation = Conversation.ask("How many red circles are left of the blue square in this picture?")
    for _ in range(3):
        conversation = conversation.reply("There are three red circles, and one of them is large.", TextPart("And what is above it?"))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        prompt = processor.prompt(conversation)
        seconds.append(time.perf_counter() - start)
    assert len(prompt.ids) > 100
    assert min(seconds) < 1e-3


def test_call_encodes_what_the_caller_wrote() -> None:
    processor = tiny_processor()
    system = processor.template.system
    text = f"{system} USER: <image>\nwhat? ASSISTANT:"
    batch = processor(images=picture(), text=text)
    prompt = processor.prompt(Conversation.ask("what?", picture()))
    assert batch["input_ids"].tolist() == [list(prompt.ids)]
    assert torch.equal(batch["pixel_values"], prompt.tiles_N3SS)


def test_call_pads_batches() -> None:
    processor = tiny_processor()
    processor.tokenizer.padding_side = "left"
    batch = processor(images=[Image.new("RGB", (5, 5))], text=["a red star", "<image>"], padding=True)
    assert batch["attention_mask"].tolist()[1] == [1] * 17
    assert batch["attention_mask"][0, 0] == 0
    assert "pixel_values" not in processor(text="hi")
    with pytest.raises(InputError, match="padding"):
        processor(text=["a", "a red star"])


@pytest.mark.parametrize(
    ("text", "images"), [("what?", [picture()]), ("<image><image>", [picture()]), ("<image>", None), (None, [picture()])]
)
def test_call_needs_one_picture_for_each_mark(text: str | None, images: Any) -> None:
    with pytest.raises(PromptError):
        tiny_processor()(images=images, text=text)


@pytest.mark.parametrize("template", ["v1", "v1_hf", "plain"])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_save_and_load_keep_everything(tmp_path: Path, template: str, aspect: Any) -> None:
    processor = tiny_processor(template, ImageProcessor(size_px=28, crop_px=28, aspect=aspect))
    processor.save_pretrained(tmp_path)
    loaded = LlavaProcessor.from_pretrained(tmp_path)
    assert loaded.files() == processor.files()
    assert (loaded.template, loaded.tile_grid, loaded.image_token_id) == (processor.template, processor.tile_grid, processor.image_token_id)


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    table = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**table, **values}))


def test_the_models_configuration_decides(tmp_path: Path) -> None:
    tiny_processor().save_pretrained(tmp_path)
    change(tmp_path, "processor_config.json", patch_size=None)
    values = {"image_token_index": IMAGE_TOKEN + 1, "vision_feature_select_strategy": "full", "vision_config": {"patch_size": 4}}
    change(tmp_path, "config.json", **values)
    loaded = LlavaProcessor.from_pretrained(tmp_path)
    assert (loaded.image_token_id, loaded.patch_size, loaded.keep_cls) == (IMAGE_TOKEN + 1, 4, True)


def test_the_arrangement_of_transformers_5_is_read(tmp_path: Path) -> None:
    processor = tiny_processor()
    processor.save_pretrained(tmp_path)
    change(tmp_path, "processor_config.json", image_processor=processor.image_processor.to_dict())
    (tmp_path / "preprocessor_config.json").unlink()
    assert LlavaProcessor.from_pretrained(tmp_path).image_processor == processor.image_processor


@pytest.mark.parametrize(
    ("jinja", "expected"),
    [
        (None, "v1"),
        ("{{ message['role'].upper() + ': ' }}{{ 'ASSISTANT:' }}", "v1_hf"),
        ("{{ 'A chat between a curious user and an artificial intelligence assistant. ASSISTANT:' }}", "v1"),
    ],
)
@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json"])
def test_a_checkpoints_own_template_is_recognised(tmp_path: Path, place: str, jinja: str | None, expected: str) -> None:
    tiny_processor().save_pretrained(tmp_path)
    change(tmp_path, "processor_config.json", llavakit_template=None)
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / name).unlink()
    if jinja is not None and place.endswith(".jinja"):
        (tmp_path / place).write_text(jinja)
    elif jinja is not None:
        change(tmp_path, place, chat_template=jinja)
    assert LlavaProcessor.from_pretrained(tmp_path).template.name == expected


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("config.json", {"image_token_index": 5}, "image token 5"),
        ("config.json", {"image_token_index": "x"}, "image_token_index='x'"),
        ("config.json", {"image_token_index": 32000}, "image token 32000"),
        ("processor_config.json", {"llavakit_template": "other"}, "'other'"),
        ("processor_config.json", {"patch_size": True}, "patch_size=True"),
        ("processor_config.json", {"image_processor": {}}, "neither"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, name: str, values: dict[str, Any], complaint: str) -> None:
    tiny_processor().save_pretrained(tmp_path)
    change(tmp_path, name, **values)
    with pytest.raises(CheckpointError, match=complaint):
        LlavaProcessor.from_pretrained(tmp_path)
