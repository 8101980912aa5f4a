"""Many questions into one file: a row for each row, in order, whatever is wrong with some, and after any kill."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llavakit.cli.main import run
from llavakit.engine.bulk import Questions, local_answers, open_questions
from llavakit.engine.bulk import answer_all as answer_everything
from llavakit.engine.llm import LLM
from llavakit.errors import ConfigError, DataError, StorageError
from llavakit.types import Conversation, SamplingParams
from tests.serving import data_url, miniature, picture

SHORT = SamplingParams(max_tokens=6)


def llm() -> LLM:
    return LLM.of(miniature().core, miniature().processor, max_batch=8, kv_memory=64 << 20)


def answer_all(own: LLM, questions: Questions, output: Path, params: SamplingParams, *, model: str, **options: Any) -> int:
    who = {"model": model, "params": asdict(params)}
    return answer_everything(local_answers(own, questions, params), questions, output, who, **options)


def write(folder: Path, rows: list[Any]) -> Path:
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(picture(seed))
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "in.jsonl"


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS: list[Any] = [
    {"id": "a", "question": "How many things are there?", "image": "0.png"},
    {"question_id": 7, "text": "What is there?", "image": ["1.png"]},
    {"prompt": "Who are you?", "system": "Be short."},
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "2.png"}, {"type": "text", "text": "What?"}]}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "And?"}]},
]
BAD: list[Any] = [
    7,
    {},
    {"question": 7},
    {"question": "x", "image": "gone.png"},
    {"question": "x", "image": "../in.jsonl"},
    {"question": "x", "image": "in.jsonl"},
    {"question": "x", "image": "."},
    {"question": "x", "image": "n" * 5000},
    {"question": "x", "image": "a\0b"},
    {"question": "x" * 20_000},
    {"messages": []},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}]}]},
    {"question": "x", "system": 3},
]


def test_every_row_gets_its_answer_in_order(tmp_path: Path) -> None:
    rows = [*ROWS, *BAD, *ROWS]
    file = write(tmp_path, rows)
    failed = answer_all(llm(), open_questions(file), tmp_path / "out.jsonl", SHORT, model="m")
    found = lines(tmp_path / "out.jsonl")
    assert failed == len(BAD)
    assert [row["row"] for row in found] == list(range(len(rows)))
    assert found[0]["id"] == "a"
    assert found[1]["question_id"] == 7
    for index, row in enumerate(found):
        assert ("error" in row) == (len(ROWS) <= index < len(ROWS) + len(BAD)), row
    expected = miniature().chat(Conversation.ask("How many things are there?", picture(0)), SHORT)
    assert (found[0]["text"], found[0]["usage"]["completion_tokens"]) == (expected.text, expected.usage.completion_tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "in.jsonl", "out.jsonl"]


def test_a_row_that_is_no_json_has_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS[:1])
    file.write_text(file.read_text() + "{torn\n")
    assert answer_all(llm(), open_questions(file), tmp_path / "out.jsonl", SHORT, model="m") == 1
    assert "no JSON" in lines(tmp_path / "out.jsonl")[1]["error"]


def test_a_pipe_is_no_picture_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    file = write(tmp_path, [{"question": "x", "image": "pipe.png"}])
    assert answer_all(llm(), open_questions(file), tmp_path / "out.jsonl", SHORT, model="m") == 1
    assert "regular file" in lines(tmp_path / "out.jsonl")[0]["error"]


def test_one_question_about_every_picture_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, seed in (("b.png", 1), ("a.PNG", 2), ("deep/c.png", 0)):
        (tmp_path / "in" / name).write_bytes(picture(seed))
    (tmp_path / "in" / "notes.txt").write_text("x")
    command = ["generate", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out.jsonl"), "--max-tokens", "6"]
    assert run([*command, "--question", "What is there?"]) == 0
    assert [row["image"] for row in lines(tmp_path / "out.jsonl")] == ["a.PNG", "b.png", "deep/c.png"]
    assert capsys.readouterr().out.strip().endswith("out.jsonl")
    assert run([*command, "--question", "What is there?"]) == 6
    assert "is there already" in capsys.readouterr().err


def test_what_cannot_work_is_told(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    for place, question, error in ((tmp_path, None, ConfigError), (file, "x", ConfigError), (tmp_path / "x.txt", None, ConfigError)):
        with pytest.raises(error, match="question"):
            open_questions(place, question=question)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_questions(tmp_path / "empty", question="x")


def test_a_journal_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write(tmp_path, ROWS), tmp_path / "out.jsonl"

    def broken(questions: Any, journal: Any, output: Path) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llavakit.engine.bulk._write", broken)
        with pytest.raises(KeyboardInterrupt):
            answer_all(llm(), open_questions(file), out, SHORT, model="m")
    with pytest.raises(StorageError, match="other questions"):
        answer_all(llm(), open_questions(file), out, SamplingParams(max_tokens=7), model="m")
    done: list[int] = []
    answer_all(llm(), open_questions(file), out, SHORT, model="m", advance=done.append)
    assert done[0] == len(ROWS)  # everything was kept
    assert len(lines(out)) == len(ROWS)


def work(folder: Path) -> None:
    own = LLM(max_batch=4, kv_memory=32 << 20, device="cpu", dtype="float32")
    answer_all(own, open_questions(folder / "in.jsonl"), folder / "out.jsonl", SHORT, model="m")


def test_killed_at_any_moment_it_goes_on_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavakit.engine.bulk._BATCH", 4)
    write(tmp_path, [{"id": str(n), "question": f"How many things are there, {n}?", "image": f"{n % 3}.png"} for n in range(40)])
    rng = random.Random(int.from_bytes(os.urandom(4)))
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(target=work, args=(tmp_path,))
        process.start()
        time.sleep(0.2 + rng.random() * 0.8)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if not (tmp_path / "out.jsonl").exists():
        work(tmp_path)
    found = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [str(n) for n in range(40)]
    assert not [row for row in found if "error" in row]
    assert found[0]["text"] == miniature().chat(Conversation.ask("How many things are there, 0?", picture(0)), SHORT).text
