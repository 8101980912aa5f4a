"""The command line as a user meets it: in its own process, on a tiny checkpoint."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llavakit.cli.main import run
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.fake_hub import FakeHub, fake_hub, folder_files
from tests.meta_files import MetaLlama
from tests.original_folders import make_original
from tests.tiny import llama, save_llava, tiny_tokenizer

__all__ = ["fake_hub"]

RUN = "import sys; from llavakit.cli.main import main; sys.argv[0] = 'llava'; main()"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("cli") / "model"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cli") / "picture.png"
    path.write_bytes(to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 30, 20)))
    return str(path)


@pytest.fixture
def llava(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run a command in this process, as main() does."""

    def command(*arguments: str, text: str = "") -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = run(arguments)
        return Done(code, *capsys.readouterr())

    return command


def imported(code: str) -> set[str]:
    """Names of all modules that are loaded after the code ran."""
    head = "import sys, contextlib, io\nwith contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
    script = f"{head}    {code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=True)
    return set(done.stdout.split())


def test_help_lists_the_commands_and_imports_nothing_heavy(llava: Callable[..., Done]) -> None:
    done = llava("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("ask", "chat", "inspect", "lint", "doctor", "reproduce"))
    modules = imported("sys.argv = ['llava', '--help']; from llavakit.cli.main import main; main()")
    assert not modules & {"torch", "numpy", "PIL", "pydantic"}


def test_answering_imports_neither_dynamo_nor_sympy(model: str, image: str) -> None:
    call = f"sys.argv = ['llava', 'ask', {image!r}, 'what?', '--model', {model!r}, '--max-tokens', '3']"
    modules = imported(f"{call}; from llavakit.cli.main import main; main()")
    assert "torch" in modules
    assert not modules & {"torch._dynamo", "sympy", "transformers"}


def test_ask_prints_the_answer_alone_on_stdout(llava: Callable[..., Done], model: str, image: str) -> None:
    done = llava("ask", image, "what is there?", "--model", model, "--max-tokens", "8")
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert done.stderr == ""


def test_ask_json_counts_tokens(llava: Callable[..., Done], model: str, image: str) -> None:
    done = llava("ask", image, "what is there?", "--model", model, "--max-tokens", "8", "--json")
    values = json.loads(done.stdout)
    assert set(values) == {"text", "finish_reason", "usage"}
    assert values["usage"]["completion_tokens"] <= 8


def test_chat_takes_commands_and_goes_on_after_mistakes(llava: Callable[..., Done], model: str, image: str) -> None:
    lines = f"what is there?\n/image {image}\nand here?\n/image nowhere.png\n/reset\nagain?\n/quit\nnever asked\n"
    done = llava("chat", image, "--model", model, "--max-tokens", "4", text=lines)
    assert done.returncode == 0
    assert len(done.stdout.split("\n")) >= 4
    assert "there is no picture nowhere.png" in done.stderr


def test_chat_refuses_pictures_before_they_are_asked_about(llava: Callable[..., Done], model: str, image: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(image).read_bytes()[:60])
    done = llava("chat", "--model", model, "--max-tokens", "4", text=f"/image {broken}\n/image {image}\nwhat is there?\n")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert "llava: " in done.stderr.splitlines()[1]
    assert llava("chat", str(broken), "--model", model, text="what?\n").returncode == 4


def test_chat_drops_the_pictures_of_a_question_that_cannot_be_asked(llava: Callable[..., Done], model: str, image: str) -> None:
    many = f"/image {image}\n" * 20
    done = llava("chat", "--model", model, "--max-tokens", "4", text=f"{many}what is there?\nand now?\n")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert "at most 255 fit" in done.stderr
    assert "pictures are dropped" in done.stderr


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "text"
    llama().save_pretrained(folder, tokenizer=tiny_tokenizer())
    return str(folder)


def test_chat_with_a_base_model_starts_afresh_on_each_line(llava: Callable[..., Done], language_model: str, image: str) -> None:
    arguments = ("--model", language_model, "--max-tokens", "4")
    done = llava("chat", *arguments, text=f"a red\na red\n/image {image}\na red\n")
    first, second, third, _ = done.stdout.split("\n")
    assert (done.returncode, first == second == third) == (0, True)
    assert "each line starts afresh; see --template" in done.stderr
    assert "without a vision tower" in done.stderr
    talk = llava("chat", *arguments, "--template", "llama_2_chat", text="a red\na red\n")
    assert (talk.returncode, talk.stdout.count("\n"), "afresh" in talk.stderr) == (0, 2, False)


def test_a_template_may_be_named(llava: Callable[..., Done], model: str, image: str) -> None:
    def ask(*arguments: str) -> Done:
        return llava("ask", image, "what?", "--model", model, "--max-tokens", "6", "--json", *arguments)

    lengths = [json.loads(done.stdout)["usage"]["prompt_tokens"] for done in (ask(), ask("--template", "v1_hf"), ask("--template", "v1"))]
    assert lengths[1] < lengths[0] == lengths[2]
    assert ask("--template", "v9").returncode == 2


def test_inspect_reads_headers_alone(llava: Callable[..., Done], model: str) -> None:
    values = json.loads(llava("inspect", model, "--json").stdout)
    assert values["kind"] == "llava (llava-hf layout)"
    assert values["parameters"] == sum(values["parts"].values())
    assert values["template"] == "v1 (with system line)"


def test_a_revision_of_a_hub_id_is_fetched_and_shown(llava: Callable[..., Done], model: str, image: str, hub: FakeHub) -> None:
    hub.add("owner/name", {})
    hub.add("owner/name", folder_files(Path(model)), revision="v2")
    done = llava("ask", image, "what?", "--model", "owner/name", "--revision", "v2", "--max-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == llava("ask", image, "what?", "--model", model, "--max-tokens", "3").stdout
    assert json.loads(llava("inspect", "owner/name", "--revision", "v2", "--json").stdout)["tensors"] > 0
    done = llava("ask", image, "what?", "--model", "owner/name", "--revision", "v3")
    assert (done.returncode, "has no revision v3" in done.stderr) == (3, True)
    done = llava("ask", image, "what?", "--revision", "v2")
    assert (done.returncode, "leave the revision out" in done.stderr) == (3, True)


def test_doctor_says_what_will_run(llava: Callable[..., Done]) -> None:
    values = json.loads(llava("doctor", "--json").stdout)
    assert "miniature" in values["will run"]


def test_weights_of_meta_are_converted(llava: Callable[..., Done], tmp_path: Path) -> None:
    MetaLlama(num_files=2).save(tmp_path / "meta")
    done = llava("convert-llama-weights", "--input-dir", str(tmp_path / "meta"), "--output-dir", str(tmp_path / "hf"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'hf'}\n")
    assert llava("chat", "--model", str(tmp_path / "hf"), "--max-tokens", "3", text="a red\n").returncode == 0
    done = llava("inspect", str(tmp_path / "meta"))
    assert (done.returncode, "llava convert-llama-weights" in done.stderr) == (3, True)


def test_a_folder_of_original_llava_is_asked_and_converted(llava: Callable[..., Done], image: str, tmp_path: Path) -> None:
    made = make_original(tmp_path / "made", "v1.5")
    ask = ("ask", image, "what?", "--max-tokens", "5", "--model")
    expected = llava(*ask, str(made.path))
    assert expected.returncode == 0, expected.stderr
    assert json.loads(llava("inspect", str(made.path), "--json").stdout)["kind"] == "llava (original LLaVA's layout)"
    dry = llava("convert", str(made.path), str(tmp_path / "hf"), "--dry-run")
    assert (dry.returncode, dry.stdout) == (0, f"{len(list(made.model.named_parameters()))} tensors fit\n")
    done = llava("convert", str(made.path), str(tmp_path / "hf"), "--max-shard-size", "40KB")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'hf'}\n")
    assert llava(*ask, str(tmp_path / "hf")).stdout == expected.stdout
    assert llava("convert", str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "original").returncode == 0
    assert llava(*ask, str(tmp_path / "back")).stdout == expected.stdout
    again = llava("convert", str(made.path), str(tmp_path / "hf"))
    assert (again.returncode, "exists; choose another folder" in again.stderr) == (6, True)


def test_a_base_is_named(llava: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    arguments = ("convert", str(tmp_path / "adapter"), str(tmp_path / "merged"))
    done = llava(*arguments)
    assert (done.returncode, "--base" in done.stderr) == (3, True)
    done = llava(*arguments, "--base", str(tmp_path / "nowhere"))
    assert (done.returncode, "there is no folder" in done.stderr) == (3, True)


def test_the_tokenizer_alone_is_converted(llava: Callable[..., Done], tmp_path: Path) -> None:
    MetaLlama().save(tmp_path / "meta")
    arguments = ("--input_dir", str(tmp_path / "meta"), "--model_size", "tokenizer_only", "--output_dir", str(tmp_path / "hf"))
    assert llava("convert-llama-weights", *arguments).returncode == 0
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert not list((tmp_path / "hf").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "{model}", "x", "--to", "ggml"), 2, "ggml"),
        (("convert", "{image}", "x"), 3, "is a file"),
        (("convert", "{model}", "{image}"), 6, "is a file; a folder goes there"),
        (("convert-llama-weights", "--input-dir", "{model}"), 2, "--output-dir"),
        (("convert-llama-weights", "--input-dir", "{model}", "--output-dir", "{text}"), 3, "there is no params.json"),
        (("convert-llama-weights", "--input-dir", "{model}", "--output-dir", "x", "--max-shard-size", "5 cm"), 2, "max_shard_size"),
        (("ask",), 2, "--help"),
        (("nonsense",), 2, "nonsense"),
        (("ask", "{image}", "q", "--model", "{model}", "--device", "cuda:99"), 2, "there is no device cuda:99"),
        (("ask", "{image}", "q", "--model", "{model}", "--device", "tpu"), 2, "a device is auto, cpu, cuda"),
        (("ask", "{image}", "q", "--model", "{model}", "--device", "meta"), 2, "the meta device holds no numbers"),
        (("ask", "{image}", "q", "--model", "no/such/folder"), 3, "no/such/folder"),
        (("ask", "{image}", "q", "--model", "{image}"), 3, "is a file"),
        (("ask", "missing.png", "q", "--model", "{model}"), 4, "there is no picture missing.png"),
        (("ask", "/dev/zero", "q", "--model", "{model}"), 4, "not a regular file"),
        (("ask", "{text}", "q", "--model", "{model}"), 4, "not a JPEG"),
        (("ask", "{image}", "q", "--model", "{model}", "--temperature", "nan"), 4, "temperature"),
        (("ask", "{image}", "circle {long}", "--model", "{model}"), 4, "tokens"),
    ],
)
def test_errors_are_one_line_and_a_code(
    llava: Callable[..., Done], arguments: tuple[str, ...], code: int, message: str, model: str, image: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    values = {"{image}": image, "{model}": model, "{text}": str(text)}
    done = llava(*(values.get(argument, argument.replace("{long}", "circle " * 300)) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_control_c_ends_cleanly(model: str) -> None:
    command = [sys.executable, "-c", RUN, "chat", "--model", model]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    assert "/image PATH" in process.stderr.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip().endswith("interrupted")


def test_a_closed_pipe_is_quiet(model: str, image: str) -> None:
    command = f"{sys.executable} -c \"{RUN}\" ask {image} 'what is there?' --model {model} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)
    assert done.stderr == ""


def test_gguf_there_and_asked(llava: Callable[..., Done], model: str, image: str, tmp_path: Path) -> None:
    done = llava("convert", model, str(tmp_path / "gguf"), "--to", "gguf", "--gguf-type", "q8_0")
    assert done.returncode == 0, done.stderr
    facts = json.loads(llava("inspect", str(tmp_path / "gguf"), "--json").stdout)
    assert facts["kind"] == "llava (GGUF)"
    assert set(facts["dtypes"]) == {"Q8_0", "F16", "F32"}
    assert facts["parts"].keys() == {"language_model", "vision_tower", "multi_modal_projector"}
    file, tower = tmp_path / "gguf" / "model-q8_0.gguf", tmp_path / "gguf" / "mmproj-f16.gguf"
    for options in (["--model", str(tmp_path / "gguf")], ["--model", str(file), "--vision-tower", str(tower)]):
        assert llava("ask", image, "what is there?", "--max-tokens", "2", *options).returncode == 0
    done = llava("lint", str(file))
    assert (done.returncode, "no small files" in done.stderr) == (3, True)
