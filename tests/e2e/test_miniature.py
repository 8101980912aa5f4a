"""The embedded miniature: its size, its answers, and that transformers runs it as it runs a 7B."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llavakit.cli.main import run
from llavakit.engine.llm import LLM, MINIATURE
from llavakit.geometry import num_image_tokens
from llavakit.pretrained.causal_lm import LlavaLlamaForCausalLM
from llavakit.reproduce.examination import examine, scores
from llavakit.storage.folder import manifest_problems
from llavakit.types import Conversation, SamplingParams
from llavakit.world.questions import conclude

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
QUESTIONS = (
    ("count", "How many things are there?", "6"),
    ("color", "What color is the star?", "green"),
    ("where", "Where is the red cross?", "bottom right"),
    ("read", "Read the word.", "word VAN"),
    ("exist", "Is there a purple triangle?", "no"),
    ("side", "Is the green star above the red cross?", "yes"),
    ("reason", "Without the blue things, how many are left?", "4"),
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", device="cpu")


def test_it_is_small_and_whole() -> None:
    files = [path for path in MINIATURE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert manifest_problems(MINIATURE, check_hashes=True) == []
    model = LlavaLlamaForCausalLM.from_pretrained(MINIATURE)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() <= 7_000_000
    assert model.config.text_config.hidden_size % 256 == model.config.vision_config.hidden_size % 256 == 0


def test_it_answers_about_the_example_picture(llm: LLM) -> None:
    replies = llm.chat([Conversation.ask(text, SCENE.read_bytes()) for _, text, _ in QUESTIONS], SamplingParams(max_tokens=160))
    concluded = [(kind, text, conclude(kind, reply.text)) for (kind, text, _), reply in zip(QUESTIONS, replies, strict=True)]
    assert concluded == list(QUESTIONS)
    assert {reply.finish_reason for reply in replies} == {"stop"}


def test_it_remembers_the_picture_in_a_second_turn(llm: LLM) -> None:
    first = Conversation.ask("What color is the star?", SCENE.read_bytes())
    second = first.reply(llm.chat(first).text, *Conversation.ask("Read the word.").messages[0].parts)
    assert "VAN" in llm.chat(second).text


def test_it_asks_for_a_picture_where_there_is_none(llm: LLM) -> None:
    assert "picture" in llm.chat(Conversation.ask("How many things are there?")).text


def test_a_sample_of_the_examination(llm: LLM, tmp_path: Path) -> None:
    table = scores(examine(llm, {"plain": 40, "shuffled": 10}, tmp_path / "replies.sqlite", seed=7))
    assert table["plain"]["all"].right >= 0.9 * table["plain"]["all"].total
    assert table["shuffled"]["all"].right <= 0.7 * table["shuffled"]["all"].total


def test_transformers_gives_the_same_logits_and_the_same_answer(llm: LLM) -> None:
    from transformers import LlavaForConditionalGeneration

    oracle = LlavaForConditionalGeneration.from_pretrained(MINIATURE, dtype=torch.float32, attn_implementation="eager").eval()
    ours = LlavaLlamaForCausalLM.from_pretrained(MINIATURE, dtype="float32")
    prompt = llm.processor.prompt(Conversation.ask("Describe the picture.", SCENE.read_bytes()))
    given = {"input_ids": torch.tensor([prompt.ids]), "pixel_values": prompt.tiles_N3SS}
    assert prompt.ids.count(ours.config.image_token_index) == num_image_tokens(ours.config.image_grid)
    with torch.no_grad():
        difference = (ours(**given).logits - oracle(**given).logits).abs().max()
    assert float(difference) < 1e-4
    expected = oracle.generate(**given, attention_mask=torch.ones_like(given["input_ids"]), max_new_tokens=100, do_sample=False)
    assert ours.generate(given["input_ids"], pixel_values=prompt.tiles_N3SS, max_new_tokens=100).tolist() == expected.tolist()


def test_the_command_line_answers_with_it_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", str(SCENE), "What color is the star?"]) == 0
    captured = capsys.readouterr()
    assert "green" in captured.out
    assert captured.err == "llava: using the embedded miniature model; --model takes a folder or a hub id\n"


def test_a_new_process_loads_no_compiler() -> None:
    code = f"import sys; from llavakit.cli.main import run; run(['ask', {str(SCENE)!r}, 'What is there?']); print(*sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=True)
    modules = set(done.stdout.split())
    assert "torch" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy", "transformers"}
