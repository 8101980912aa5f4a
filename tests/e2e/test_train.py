"""llava train as a user meets it: recipes on a tiny model, what a run leaves, kills at any moment, and what goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import write_result
from llavakit.checkpoint.load import load_core
from llavakit.cli.main import run
from llavakit.engine.llm import LLM
from llavakit.storage.tensors import TensorFolder
from llavakit.types import Conversation
from tests.tiny import save_llava
from tests.training_rows import ANSWER, write_rows

ROOT = Path(__file__).parents[2]
SMALL = ("data.tokens_per_batch=1024", "data.max_sample_tokens=512", "data.multiple_of=1", "samples_per_step=6", "compute_dtype=float32")
LEARNING = ("optim.lr=2e-3", "sample_answers=1", "workers=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("train") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rows(tmp_path_factory.mktemp("rows"), 30)


def arguments(recipe: str, folder: Path, model: Path, rows: tuple[Path, Path], *settings: str) -> list[str]:
    command = ["train", recipe, str(folder), "--model", str(model), "--data", str(rows[0]), "--images", str(rows[1])]
    return [*command, *(part for setting in (*SMALL, *settings) for part in ("--set", setting))]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(folder)]


def test_a_task_is_learned_and_the_run_folder_explains_itself(tmp_path: Path, model: Path, rows: tuple[Path, Path]) -> None:
    folder = tmp_path / "run"
    assert run(arguments("finetune_task", folder, model, rows, *LEARNING, "optim.lr=4e-3", "epochs=16", "preprocess=crop")) == 0
    names = {"config.json", "environment.json", "export", "index", "lock", "loss.png", "metrics.jsonl", "samples.md", "train.json"}
    assert names <= {path.name for path in folder.iterdir()}
    told = lines(folder)
    assert told[-1]["loss"] < 0.1 < told[0]["loss"]
    assert {"right", "tokens_per_s", "samples_per_s", "tflops_per_s", "mfu", "memory_gb", "wait_share"} <= told[0].keys()
    settings = json.loads((folder / "train.json").read_text())
    assert settings["steps"] == len(told)
    assert settings["recipe"] == "finetune_task"
    llm = LLM(folder / "export", dtype="float32", device="cpu")
    assert llm.chat(Conversation.ask("what is there?", (rows[1] / "0.png").read_bytes())).text.strip() == ANSWER
    assert ANSWER in (folder / "samples.md").read_text()


def test_stage_one_moves_the_projector_alone(tmp_path: Path, model: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": ANSWER}]
    captions = [{"id": "0", "image": "0.png", "conversations": turns}]
    _, pictures = write_rows(tmp_path / "rows", 1)
    (tmp_path / "captions.json").write_text(json.dumps(captions * 4))
    folder = tmp_path / "run"
    assert run(arguments("pretrain_v15", folder, model, (tmp_path / "captions.json", pictures), *LEARNING)) == 0
    before, after = (dict(load_core(path).named_parameters()) for path in (model, folder / "export"))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("multi_modal_projector.")}
    assert {weight.dtype for weight in after.values()} == {weight.dtype for weight in before.values()}


def test_rows_of_every_kind_of_file_train_together(
    tmp_path: Path, model: Path, rows: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    values = json.loads(rows[0].read_text())
    with tarfile.open(tmp_path / "pictures.tar", "w") as pictures, tarfile.open(tmp_path / "rows.tar", "w") as whole:
        for row in values:
            (tmp_path / "row.json").write_text(json.dumps(row))
            whole.add(tmp_path / "row.json", f"{row['id']}.json")
            if "image" in row:
                pictures.add(rows[1] / row["image"], row["image"])
                whole.add(rows[1] / row["image"], row["image"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    files = ["--data", str(tmp_path / "rows.tar"), "--data", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path / "pictures.tar")]
    command = arguments("finetune_task", tmp_path / "run", model, rows, *LEARNING, "epochs=1")
    assert run([*command[:5], *files, *command[command.index("--set") :]]) == 0
    assert f"{2 * len(values)} samples in batches" in caplog.text


@pytest.mark.parametrize("recipe", ["finetune_v15_lora", "finetune_v15_qlora"])
def test_an_adapter_is_learned_beside_the_model(tmp_path: Path, model: Path, rows: tuple[Path, Path], recipe: str) -> None:
    folder, lora = tmp_path / "run", 'lora={"rank": 8, "alpha": 16.0}'
    settings = (lora, "optim.lr=2e-2", "epochs=16", "preprocess=crop", "workers=0", "optim.groups=[]", 'trainable=["*.lora_A", "*.lora_B"]')
    assert run(arguments(recipe, folder, model, rows, *settings)) == 0
    assert lines(folder)[-1]["loss"] < 0.5 < lines(folder)[0]["loss"]
    question = Conversation.ask("what is there?", (rows[1] / "0.png").read_bytes())
    if recipe == "finetune_v15_lora":
        assert LLM(folder / "export", dtype="float32", device="cpu").chat(question).text.strip() == ANSWER
        beside = LLM(model, dtype="float32", device="cpu", adapters={"mine": folder / "export"})
        assert beside.chat(question, adapter="mine").text.strip() == ANSWER
    assert ANSWER in (folder / "samples.md").read_text()
    assert "quantization_config" not in (folder / "export" / "adapter_config.json").read_text()


@pytest.mark.parametrize("recipe", ["dpo", "dpo_lora"])
def test_better_answers_are_preferred(tmp_path: Path, model: Path, rows: tuple[Path, Path], recipe: str) -> None:
    pairs = [
        {"image": f"{number}.png", "question": "what is there?", "chosen": ANSWER, "rejected": "a green star"}
        for number in range(24)
        if number % 3 != 2
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    folder = tmp_path / "run"
    settings = ("optim.lr=3e-3", "epochs=6", "preprocess=crop", "workers=0", "sample_answers=1")
    assert run(arguments(recipe, folder, model, (tmp_path / "pairs.json", rows[1]), *settings)) == 0
    told = lines(folder)
    assert told[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the model is its own reference at first
    assert told[-1]["loss"] < 0.2
    assert told[-1]["right"] == 1.0
    assert told[-1]["chosen_reward"] > told[-1]["rejected_reward"]
    # The whole model needs what it gave before; adapters are switched off instead.
    assert (folder / "reference").is_dir() == (recipe == "dpo")
    assert run(arguments(recipe, folder, model, (tmp_path / "pairs.json", rows[1]), *settings)) == 0


def test_kept_features_change_no_loss(tmp_path: Path, model: Path, rows: tuple[Path, Path], capsys: Any) -> None:
    settings = (*LEARNING, "steps=4", "template=v1", "sample_answers=0")
    for name, kept in (("seen", "false"), ("kept", "true"), ("again", "true")):
        folder = tmp_path / ("kept" if name == "again" else name)
        assert run(arguments("pretrain_v15", folder, model, rows, *settings, f"data.cache_features={kept}")) == 0
    assert [loss for _, loss, _ in losses(tmp_path / "kept")] == pytest.approx([loss for _, loss, _ in losses(tmp_path / "seen")], rel=1e-6)
    assert run(arguments("finetune_v16", tmp_path / "tower", model, rows, "data.cache_features=true", 'trainable=["*"]')) == 2
    assert "frozen tower" in capsys.readouterr().err


def test_other_settings_or_rows_are_refused_where_a_run_is(tmp_path: Path, model: Path, rows: tuple[Path, Path], capsys: Any) -> None:
    folder = tmp_path / "run"
    assert run(arguments("finetune_task", folder, model, rows, *LEARNING, "steps=2")) == 0
    assert run(arguments("finetune_task", folder, model, rows, *LEARNING, "steps=2", "optim.lr=1e-5")) == 6
    assert "optim.lr was 0.002, is 1e-05" in capsys.readouterr().err
    others = write_rows(tmp_path / "others", 30, seed=1)
    assert run(arguments("finetune_task", folder, model, others, *LEARNING, "steps=2")) == 6
    assert "other settings" in capsys.readouterr().err


def test_rows_that_cannot_train_stop_the_run_unless_they_may_be_left_out(
    tmp_path: Path, model: Path, rows: tuple[Path, Path], capsys: Any
) -> None:
    kept = write_rows(tmp_path / "torn", 30)
    (kept[1] / "3.png").write_bytes(b"no picture")
    (kept[1] / "4.png").unlink()
    command = arguments("finetune_task", tmp_path / "run", model, kept, *LEARNING, "steps=2")
    assert run(command) == 4
    assert "2 of 30 rows cannot train" in capsys.readouterr().err
    assert run([*command, "--set", "data.max_bad_share=0.1"]) == 0
    assert json.loads((tmp_path / "run" / "index" / "0" / "key.json").read_text())["num_fatal"] == 2


def test_mistakes_are_one_line(tmp_path: Path, model: Path, rows: tuple[Path, Path], capsys: Any) -> None:
    wrong = (
        (["train", "finetune", str(tmp_path)], "there is no recipe 'finetune'; there are pretrain_v1"),
        (["train", "finetune_task", str(tmp_path), "--set", "optim.colour=1"], "optim has no field 'colour'"),
        (["train", "finetune_task", str(tmp_path), "--set", "optim.lr=fast"], "optim.lr must be a number, got 'fast'"),
        (["train", "finetune_task", str(tmp_path), "--set", "lr"], "NAME=VALUE"),
        (["train", "finetune_task", str(tmp_path / "x")], "a run needs rows to train on"),
        (["train"], "name a recipe and a folder"),
        (
            ["train", "finetune_task", "x", "--data", "a", "--data", "b", "--images", "c", "--images", "d", "--images", "e"],
            "2 --data and 3",
        ),
    )
    for command, complaint in wrong:
        assert run(command) in (2, 4)
        captured = capsys.readouterr().err
        assert complaint in captured, captured
        assert captured.count("\n") == 1


def test_a_dry_run_prints_settings_that_can_be_given_again(tmp_path: Path, model: Path, rows: tuple[Path, Path], capsys: Any) -> None:
    assert run([*arguments("finetune_v15", tmp_path / "run", model, rows), "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 2e-5
    assert printed["samples_per_step"] == 6
    assert not (tmp_path / "run").exists()


# kill -9 at any moment


def start(command: list[str]) -> multiprocessing.process.BaseProcess:
    def work() -> None:
        torch.set_num_threads(1)
        os._exit(run(command))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def check_kills(folder: Path, command: Callable[[Path], list[str]], kills: int, seed: int) -> None:
    """Kill runs at drawn steps and moments; the last one must end with the bits of one that nobody killed."""
    whole = start(command(folder / "whole"))
    whole.join(120)
    assert whole.exitcode == 0
    expected, rng = losses(folder / "whole"), random.Random(seed)
    points = sorted(rng.randrange(len(expected)) for _ in range(kills))
    for step in points:
        process, metrics = start(command(folder / "cut")), folder / "cut" / "metrics.jsonl"
        while process.is_alive() and (metrics.read_bytes().count(b"\n") if metrics.is_file() else 0) < step:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
    last = start(command(folder / "cut"))
    last.join(120)
    assert last.exitcode == 0
    assert losses(folder / "cut") == expected, f"seed {seed}, killed at {points}"
    ours, theirs = (
        {path.name: path.read_bytes() for path in (folder / name / "export").glob("*.safetensors")} for name in ("whole", "cut")
    )
    assert ours == theirs != {}, f"seed {seed}, killed at {points}"


KILLED = {
    "tuned": ("finetune_task", ("optim.lr=2e-3", "preprocess=crop")),
    "projector": ("pretrain_v15", ("optim.lr=2e-3", "template=v1")),
    "lora": ("finetune_v15_lora", ("optim.lr=2e-3", "preprocess=crop")),
}


def killed_command(kind: str, model: Path, rows: tuple[Path, Path]) -> Callable[[Path], list[str]]:
    recipe, settings = KILLED[kind]
    common = ("steps=14", "save.every_s=0", "sample_answers=0", "workers=1", "samples_per_step=12")
    return lambda folder: arguments(recipe, folder, model, rows, *settings, *common)


@pytest.mark.parametrize("kind", KILLED)
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, model: Path, rows: tuple[Path, Path], kind: str) -> None:
    check_kills(tmp_path, killed_command(kind, model, rows), kills=3, seed=int.from_bytes(os.urandom(4)))


@pytest.mark.soak
def test_runs_killed_two_hundred_times_go_on_with_the_same_bits(tmp_path: Path, model: Path, rows: tuple[Path, Path]) -> None:
    kinds, rounds, kills = list(KILLED), 14, 5
    for kind in kinds:
        for seed in range(rounds):
            folder = tmp_path / f"{kind}-{seed}"
            folder.mkdir()
            check_kills(folder, killed_command(kind, model, rows), kills=kills, seed=seed)
    write_result("train_kills", "make soak", {"kinds": kinds, "num_runs": len(kinds) * rounds, "kills_per_run": kills})


def test_two_processes_train_by_the_same_command(tmp_path: Path, model: Path, rows: tuple[Path, Path]) -> None:
    settings = (*LEARNING, "steps=4", "preprocess=crop")
    assert run(arguments("finetune_task", tmp_path / "one", model, rows, *settings)) == 0
    llava = str(Path(sys.executable).parent / "llava")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", llava]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*torchrun, *arguments("finetune_task", tmp_path / "two", model, rows, *settings)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [loss for _, loss, _ in losses(tmp_path / "two")] == pytest.approx([loss for _, loss, _ in losses(tmp_path / "one")], rel=1e-5)
    with TensorFolder(tmp_path / "one/export") as one, TensorFolder(tmp_path / "two/export") as two:
        for name in one.in_file_order():
            torch.testing.assert_close(one.read(name), two.read(name), rtol=1e-4, atol=1e-4)
