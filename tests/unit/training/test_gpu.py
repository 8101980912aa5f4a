"""Training on a GPU: attention as one kernel, compiled layers, whole runs of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llavakit.cli.main import run
from llavakit.engine.llm import LLM
from llavakit.model.surgery import attend_by, compile_layers
from llavakit.ops.attention import Packed
from llavakit.ops.segmented import Segmented
from llavakit.training.data import moved
from llavakit.types import Conversation
from tests.e2e.test_train import arguments, lines
from tests.tiny import save_llava
from tests.toy_run import toy_core, toy_source
from tests.training_rows import ANSWER, write_rows

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # of inductor and Dynamo
BOUNDS = torch.tensor([0, 1, 34, 40, 300], dtype=torch.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("train") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rows(tmp_path_factory.mktemp("rows"), 30)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (6, 2, 128), (3, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_kernel_has_the_values_and_gradients_of_segments(
    heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    found = []
    for context, device in ((Packed(BOUNDS, window), "cpu"), (Segmented(BOUNDS.cuda(), window), "cuda")):
        generator = torch.Generator().manual_seed(heads)
        qkv = [
            torch.randn(300, count, width, generator=generator).to(dtype).to(device).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        ]
        o_TNH = context.attend(0, *qkv)
        (o_TNH.float() * torch.linspace(0.1, 1, 300, device=device)[:, None, None]).sum().backward()
        found.append([o_TNH.detach().cpu(), *(tensor.grad.cpu() for tensor in qkv if tensor.grad is not None)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-2 * float(theirs.abs().max()), rtol=3e-2)


def test_compiled_layers_have_the_losses_of_plain_ones() -> None:
    plain, compiled = toy_core().cuda(), toy_core().cuda()
    attend_by(compiled, Segmented)
    compile_layers(compiled)
    for number in range(6):
        batch = moved(toy_source(number, samples_per_batch=2 + number).batch(0).batch, torch.device("cuda"))
        losses = [core.loss_packed(batch, dtype=torch.bfloat16).sum for core in (plain, compiled)]
        losses[1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("recipe", ["finetune_task", "finetune_v15_lora", "finetune_v15_qlora"])
def test_runs_learn(tmp_path: Path, model: Path, rows: tuple[Path, Path], recipe: str) -> None:
    lora = ('lora={"rank": 8, "alpha": 16.0}', "optim.groups=[]", 'trainable=["*.lora_A", "*.lora_B"]') if "lora" in recipe else ()
    settings = ("compute_dtype=bfloat16", "optim.lr=1e-2", "epochs=20", "preprocess=crop", "workers=0", "recompute=layers", *lora)
    command = arguments(recipe, tmp_path / "run", model, rows, *settings)
    assert run(command) == 0
    told = lines(tmp_path / "run")
    assert told[-1]["loss"] < 0.5 < told[0]["loss"]
    assert told[-1]["memory_gb"] > 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["device"] == torch.cuda.get_device_name()
    if recipe == "finetune_task":
        llm = LLM(tmp_path / "run" / "export", device="cuda")
        assert llm.chat(Conversation.ask("what is there?", (rows[1] / "0.png").read_bytes())).text.strip() == ANSWER
    assert run(command) == 0  # it is over, and says so


@pytest.mark.parametrize("recipe", ["dpo", "dpo_lora"])
def test_pairs_are_learned(tmp_path: Path, model: Path, rows: tuple[Path, Path], recipe: str) -> None:
    pairs = [
        {"image": f"{number}.png", "question": "what is there?", "chosen": ANSWER, "rejected": "a green star"} for number in (0, 1, 3, 4)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs * 4))
    settings = ("compute_dtype=bfloat16", "optim.lr=3e-3", "epochs=8", "preprocess=crop", "workers=0", "sample_answers=0")
    assert run(arguments(recipe, tmp_path / "run", model, (tmp_path / "pairs.json", rows[1]), *settings)) == 0
    told = lines(tmp_path / "run")
    assert told[-1]["loss"] < told[0]["loss"] / 2
    assert told[-1]["right"] > 0.8
