"""README and docs are true: every command and snippet runs, every link and path exists, every figure is in its results file.

A block marked `no-run` needs what a test has not (a published checkpoint): it is parsed, and its names and options must exist.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import llavakit
from benchmarks.miniature import markdown_table
from llavakit.cli.main import build_app, run
from tests.serving import running

ROOT = Path(__file__).parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS)
PACKAGES = sorted(path.name for path in (ROOT / "llavakit").iterdir() if path.is_dir())


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    is_run: bool
    is_served: bool
    """Whether it asks a server: one that it starts itself, or else the test's."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    matches = re.finditer(r"^```(\S*)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(page, text[: match.start()].count("\n") + 1, match[1], "no-run" not in match[2], "served" in match[2], match[3])
        for match in matches
    ]


BLOCKS = [block for page in PAGES for block in blocks(page, (ROOT / page).read_text("utf-8"))]
COMMANDS = [
    (block, line)
    for block in BLOCKS
    if block.language == "bash" and not block.is_served
    for line in block.text.splitlines()
    if line.strip()
]
SNIPPETS = [block for block in BLOCKS if block.language == "python" and not block.is_served]
SERVED = [block for block in BLOCKS if block.is_served]


@pytest.fixture(scope="module", autouse=True)
def fresh_runs() -> Iterator[None]:
    """What the pages train lies in runs/docs, which git does not see."""
    shutil.rmtree(ROOT / "runs/docs", ignore_errors=True)
    yield
    shutil.rmtree(ROOT / "runs/docs", ignore_errors=True)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "text"}
    assert COMMANDS
    assert SNIPPETS


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=str)
def test_commands_work(block: Block, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(line, comments=True)
    match program:
        case "llava" if block.is_run:
            assert run(arguments) == 0, capsys.readouterr().err
            assert capsys.readouterr().out.strip()
        case "llava":
            build_app().parse_args(arguments, exit_on_error=False, print_error=False)
        case "make":
            dry_run(*arguments)
        case "python" if arguments[:1] == ["-m"]:
            subprocess.run([sys.executable, "-m", arguments[1], "--help"], check=True, capture_output=True, timeout=120)
        case _:
            pytest.fail(f"no test runs {line!r}")


def dry_run(*targets: str) -> list[str]:
    """List what make would run; also where make itself runs the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", "-n", *targets]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30, env=environment).stdout.splitlines()


def test_make_demo_asks_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(dry_run("demo")[-1])
    assert program.endswith("bin/llava")
    assert run(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_the_ci_runs_make_test() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text("utf-8")
    assert any("pytest" in line for line in dry_run("test"))


@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_snippets_work(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    tree = ast.parse(block.text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llavakit")]
    names = [(node.module or "", alias.name) for node in imports for alias in node.names]
    assert names
    assert all(hasattr(importlib.import_module(module), name) for module, name in names)
    if block.is_run:
        exec(compile(tree, str(block), "exec"), {"__name__": "snippet"})
        assert capsys.readouterr().out.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(name="llava-miniature") as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize("block", SERVED, ids=str)
def test_what_asks_a_server_works(block: Block, address: str) -> None:
    if "llava serve" in block.text:  # a server of its own, and a port
        text, answer = block.text.replace("8000", str(free_port())), r"That makes \d+\."
    else:
        text, answer = block.text.replace("http://127.0.0.1:8000", address), r"That makes 6\."
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-ec", text]
    if block.language == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path})
    assert re.search(answer, done.stdout), done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not ((ROOT / page).parent / link).exists()] == []
    paths = re.findall(r"`((?:llavakit|tests|docs|examples|benchmarks)/[\w./-]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = re.findall(rf"`((?:{'|'.join(PACKAGES)})/\w+)(?:\.py)?`", text)
    assert [module for module in modules if not (ROOT / "llavakit" / f"{module}.py").exists()] == []


def leaves(values: object) -> list[float]:
    match values:
        case dict():
            return [leaf for value in values.values() for leaf in leaves(value)]
        case list():
            return [leaf for value in values for leaf in leaves(value)]
        case bool():
            return []
        case int() | float():
            return [float(values)]
        case _:
            return []


def figures(line: str) -> list[str]:
    """Find the decimal numbers and the numbers with thousands separators of a line, links and code aside."""
    return re.findall(r"(?<![\w.])(?:\d+\.\d+|\d{1,3}(?:,\d{3})+)(?![\w.]\w)", re.sub(r"\]\([^)]*\)|`[^`]*`", "", line))


def is_recorded(figure: str, recorded: list[float]) -> bool:
    digits = len(figure.partition(".")[2])
    value = float(figure.replace(",", ""))
    return any(round(leaf * scale, digits) == value for leaf in recorded for scale in (1, 100, 1e-9))


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_in_the_results_file_beside_them(page: str) -> None:
    for line in (ROOT / page).read_text("utf-8").splitlines():
        files = re.findall(r"\]\([./]*(benchmarks/results/\w+\.json)\)", line)
        recorded = [leaf for name in files for leaf in leaves(json.loads((ROOT / name).read_text("utf-8")))]
        if files:
            assert [figure for figure in figures(line) if not is_recorded(figure, recorded)] == [], line


def test_figures_are_found_and_compared_at_their_own_precision() -> None:
    assert figures("| 14.1 GB of 10,000 files, 1.13x (`0.5`), version 5 ([a](b/1.0.json)) |") == ["14.1", "10,000", "1.13"]
    assert is_recorded("14.1", [14.126e9])
    assert is_recorded("97.3", [0.9731])
    assert not is_recorded("1.14", [1.131])


def test_the_accuracy_table_is_the_results_file() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/miniature.json").read_text("utf-8"))
    assert markdown_table(recorded["accuracy"]) in (ROOT / "README.md").read_text("utf-8")


def test_every_public_name_is_there() -> None:
    assert all(getattr(llavakit, name).__name__ == name for name in llavakit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llavakit.nothing
