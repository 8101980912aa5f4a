"""Parity of pixels, ids and files with transformers 5.x."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavakit.engine.llm import LLM
from llavakit.geometry import num_tiles, patch_grid
from llavakit.pretrained.causal_lm import LlavaLlamaForCausalLM
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.types import Conversation, ImagePart, Message, SamplingParams, TextPart
from llavakit.world.render import to_png
from tests.real_data import llama2_processor, llama2_tokenizer, shared_data
from tests.tiny import SIDE, VOCAB, family_config, llava_config, scale_weights, tiny_processor

SIZES = ((1, 1), (2, 50), (50, 2), (48, 48), (47, 49), (60, 40), (40, 60), (333, 501), (640, 480), (30, 1900), (1900, 30))
TEXTS = (
    "Hello", " Hello", "Hello  world", "a    b", " ", "   ", " " * 20 + "end", "\n\n", "tab\tx", "naïve café", "日本語", "😀👩‍👩‍👧",
    "1234567", "A</s>USER: <image>\nB ASSISTANT: C", "<s>x", "\u2581under", "a\u00a0b", "ẹ̀rọ", "def f(x):\n    return x + 1\n",
)  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def oracle_pixels(oracle: Any, image: Image.Image) -> torch.Tensor:
    """Return the tiles [N, 3, S, S] of one picture."""
    pixels = torch.as_tensor(oracle(images=image, return_tensors="pt")["pixel_values"])
    return pixels if pixels.dim() == 4 else pixels[0]


@pytest.mark.parametrize(("size_px", "crop_px"), [(48, 48), (48, 40), (40, 48)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_clips_processor(size: tuple[int, int], size_px: int, crop_px: int) -> None:
    oracle = CLIPImageProcessorPil(size={"shortest_edge": size_px}, crop_size=crop_px)
    assert torch.equal(ImageProcessor(size_px=size_px, crop_px=crop_px).apply(noise(*size)), oracle_pixels(oracle, noise(*size)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padded_pixels_equal_llavas_processor(size: tuple[int, int]) -> None:
    oracle = LlavaImageProcessorPil(size={"shortest_edge": 48}, crop_size=48, do_pad=True)
    assert torch.equal(ImageProcessor(size_px=48, crop_px=48, aspect="pad").apply(noise(*size)), oracle_pixels(oracle, noise(*size)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stretched_pixels_equal_siglips_processor(size: tuple[int, int]) -> None:
    oracle = SiglipImageProcessorPil(size={"height": 42, "width": 42}, resample=3)
    ours = ImageProcessor.from_dict({"image_processor_type": "SiglipImageProcessor", "size": {"height": 42, "width": 42}})
    assert torch.equal(ours.apply(noise(*size)), oracle_pixels(oracle, noise(*size)))


ANYRES_SIZES = ((1, 1), (48, 48), (60, 40), (40, 61), (150, 50), (333, 501), (640, 480), (30, 1900), (1900, 30))


@pytest.mark.parametrize("size", ANYRES_SIZES, ids=str)
def test_tiles_equal_llava_nexts_processor(size: tuple[int, int]) -> None:
    values = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 48},
        "crop_size": {"height": 48, "width": 48},
        "image_grid_pinpoints": [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]],
    }
    ours, oracle = ImageProcessor.from_dict(values), LlavaNextImageProcessorPil(**values)
    tiles = ours.apply(noise(*size))
    assert torch.equal(tiles, oracle_pixels(oracle, noise(*size)))
    assert tiles.shape[0] == num_tiles(ours.grid(size, patch_grid(48, 12)))
    assert ImageProcessor.from_dict(ours.to_dict()) == ours


@pytest.mark.parametrize("name", ["waterview.jpg", "extreme_ironing.jpg"])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_photographs_equal_at_full_size(name: str, aspect: Any) -> None:
    image = Image.open(shared_data() / "photos" / name).convert("RGB")
    oracle = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=336, do_pad=aspect == "pad")
    assert torch.equal(ImageProcessor(aspect=aspect).apply(image), oracle_pixels(oracle, image))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save LLaVA-1.5's processor once: building tokenizer.json takes a second."""
    folder = tmp_path_factory.mktemp("llava")
    llama2_processor().save_pretrained(folder)
    config = llava_config()
    config.image_token_index = 32000
    (folder / "config.json").write_text(config.to_json())
    return folder


def test_saved_processors_load_in_transformers_with_equal_prompts(saved: Path) -> None:
    processor, oracle = llama2_processor(), AutoProcessor.from_pretrained(saved)
    data = (shared_data() / "photos" / "waterview.jpg").read_bytes()
    image = Image.open(shared_data() / "photos" / "waterview.jpg")
    first = Message("user", (ImagePart(data), TextPart("Please describe this image in detail.")))
    conversation = Conversation((first,)).reply("A lake, and a pier.", TextPart("How long is the pier?"))
    turns = [
        {"role": message.role, "content": [{"type": "image"}] * len(message.images) + [{"type": "text", "text": message.text}]}
        for message in conversation.messages
    ]
    text = oracle.apply_chat_template(turns, add_generation_prompt=True)
    expected, prompt = oracle(images=image, text=text, return_tensors="pt"), processor.prompt(conversation)
    assert expected["input_ids"].tolist() == [list(prompt.ids)]
    assert torch.equal(expected["pixel_values"], prompt.tiles_N3SS)


def test_saved_tokenizers_give_equal_ids_in_transformers(saved: Path) -> None:
    tokenizer, oracle = llama2_tokenizer(), AutoProcessor.from_pretrained(saved).tokenizer
    assert [oracle.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (oracle.pad_token_id, oracle.bos_token_id, oracle.eos_token_id, len(oracle)) == (32001, 1, 2, 32002)


def test_call_equals_transformers_processor(saved: Path) -> None:
    image, text = noise(60, 40), "USER: <image>\nWhat is it? ASSISTANT:"
    expected = AutoProcessor.from_pretrained(saved)(images=image, text=text, return_tensors="pt")
    values = LlavaProcessor.from_pretrained(saved)(images=image, text=text)
    assert {name: value.tolist() for name, value in values.items()} == {name: expected[name].tolist() for name in values}


@pytest.mark.parametrize("template", ["v1", "v1_hf"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_saved_templates_render_our_prompts(tmp_path: Path, template: str, system: str | None) -> None:
    processor = tiny_processor(template)
    processor.save_pretrained(tmp_path)
    config = llava_config()
    config.image_token_index = processor.image_token_id
    (tmp_path / "config.json").write_text(config.to_json())
    oracle = AutoProcessor.from_pretrained(tmp_path)
    conversation = Conversation.ask("is there a star?", system=system).reply("no", TextPart("two?")).reply("four")
    turns = [{"role": message.role, "content": message.text} for message in conversation.messages]
    text = oracle.apply_chat_template(turns)
    prompt = processor.prompt(conversation, add_generation_prompt=False)
    assert oracle(text=text, return_tensors="pt")["input_ids"].tolist() == [list(prompt.ids)]


def next_processor() -> LlavaProcessor:
    pinpoints = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    return tiny_processor(image_processor=ImageProcessor(size_px=SIDE, crop_px=SIDE, aspect="anyres", pinpoints=pinpoints))


@pytest.mark.parametrize("sizes", [((40, 60),), ((28, 28), (100, 20), (33, 71))], ids=str)
def test_prompts_of_pictures_of_any_size_equal_transformers(tmp_path: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    processor = next_processor()
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(family_config("1.6-vicuna").to_json())
    loaded, oracle = LlavaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    images = [noise(*size) for size in sizes]
    text = "USER: " + "<image>\n" * len(images) + "What is it? ASSISTANT:"
    expected = oracle(images=images, text=text, return_tensors="pt")
    values = loaded(images=images, text=text)
    assert set(values) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    assert {name: value.tolist() for name, value in values.items()} == {name: expected[name].tolist() for name in values}


def test_a_prompt_of_any_size_is_what_generate_continues(tmp_path: Path) -> None:
    """LLM, through the processor, and generate, through transformers' tensors, give one answer."""
    model = scale_weights(LlavaLlamaForCausalLM(family_config("1.6-mistral")), 2).eval()
    model.save_pretrained(tmp_path, processor=next_processor())
    conversation = Conversation.ask("what?", to_png(noise(61, 30)), to_png(noise(20, 90)))
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    answer = llm.chat(conversation, SamplingParams(max_tokens=6, ignore_eos=True))
    prompt = llm.processor.prompt(conversation)
    out = model.generate(
        torch.tensor([prompt.ids]),
        pixel_values=list(prompt.tiles_N3SS.split([num_tiles(grid) for grid in prompt.grids])),
        image_sizes=[(30, 61), (90, 20)],
        max_new_tokens=6,
        eos_token_id=[],
        logits_processor=[lambda _, scores: scores.index_fill(1, torch.arange(len(llm.processor.tokenizer), VOCAB), -torch.inf)],
    )
    assert out[0, len(prompt.ids) :].tolist() == list(answer.ids)
