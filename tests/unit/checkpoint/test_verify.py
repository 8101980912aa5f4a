"""Whether two checkpoints are the same model: of any layouts, and where they are not, what differs first."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llavakit.checkpoint.convert import Conversion, convert
from llavakit.checkpoint.load import load_core
from llavakit.checkpoint.opening import open_checkpoint
from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.streamed import streamed
from llavakit.checkpoint.verify import Comparison, Verification, verify
from llavakit.cli.main import run
from llavakit.errors import CheckpointError
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.ops.attention import Packed
from tests.folders import edit_json
from tests.meta_files import MetaLlama
from tests.original_folders import KINDS, make_original
from tests.tiny import VARIANTS, llama, save_llava

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return make_original(tmp_path / "made", "v1.6").path


def change(folder: Path, name: str, action: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of a folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = action(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_is_the_same(tmp_path: Path, kind: str) -> None:
    original = make_original(tmp_path, kind)
    convert(original.path, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "text", Conversion(to="text"))
    for second in ("hf", "text"):
        found = verify(original.path, tmp_path / second)
        assert (found.problems, found.max_weight_difference, found.first_different) == ((), 0.0, None)
        assert found.max_logit_difference == 0.0
        assert found.num_identical >= found.num_tensors - 2  # but for the rows that <image> needs
    assert any("rows" in note for note in verify(original.path, tmp_path / "hf").notes)


def test_metas_files_are_the_model_that_was_made_of_them(tmp_path: Path) -> None:
    made = MetaLlama().save(tmp_path / "meta")
    convert(made, tmp_path / "hf", Conversion(sources=Sources(allow_pickle=True)))
    assert verify(made, tmp_path / "hf", Comparison(sources=Sources(allow_pickle=True))).is_same


def test_the_first_tensor_and_the_first_layer_that_differ_are_named(tmp_path: Path, original: Path) -> None:
    convert(original, tmp_path / "hf")
    change(original, LAYER, lambda weight: weight + 0.25)
    change(original, "lm_head.weight", lambda weight: weight * 2)
    found = verify(original, tmp_path / "hf")
    assert not found.is_same
    assert found.first_different == f"language_model.{LAYER}"
    assert found.max_weight_difference >= 0.25
    assert found.first_layer == "the last layer and the norm"  # layer 1 is the last of two
    assert found.max_logit_difference is not None
    assert found.max_logit_difference > 1e-3
    assert [problem.split(" ")[0] for problem in found.problems] == [f"language_model.{LAYER}", "language_model.lm_head.weight", "logits"]


def test_a_difference_in_the_tower_shows_in_the_features(tmp_path: Path, original: Path) -> None:
    convert(original, tmp_path / "hf")
    name = "vision_tower.vision_model.embeddings.position_embedding.weight"
    change(tmp_path / "hf", name, lambda weight: weight.flip(0))
    found = verify(original, tmp_path / "hf")
    assert (found.first_different, found.first_layer) == (name, "the picture's features")


def test_another_dtype_is_as_close_as_asked(tmp_path: Path, original: Path) -> None:
    convert(original, tmp_path / "half", Conversion(dtype=torch.bfloat16))
    found = verify(original, tmp_path / "half")
    assert not found.is_same
    assert found.num_identical == 0
    assert 0 < found.max_weight_difference < 0.1
    assert verify(original, tmp_path / "half", Comparison(atol=0.1, logits_atol=1e6)).is_same


def _no_layer(folder: Path) -> None:
    edit_json(
        folder / "config.json", text_config={**json.loads((folder / "config.json").read_text())["text_config"], "num_hidden_layers": 1}
    )
    path = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if ".layers.1." not in name or "vision" in name}, path)


def _eps(folder: Path) -> None:
    edit_json(folder / "config.json", text_config={**json.loads((folder / "config.json").read_text())["text_config"], "rms_norm_eps": 0.1})


def _darker(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", image_mean=[0.4, 0.4, 0.4])
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    if "image_processor" in values:
        edit_json(path, image_processor={**values["image_processor"], "image_mean": [0.4, 0.4, 0.4]})


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "fewer layers": (_no_layer, r"only the first has language_model\.model\.layers\.1\."),
    "another setting": (_eps, "logits differ by up to"),
    "other pixels": (_darker, "the same picture becomes other pixels"),
    "another template": (
        lambda folder: edit_json(folder / "processor_config.json", llavakit_template="v0"),
        "becomes other tokens from number",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_makes_another_model_is_a_problem(tmp_path: Path, original: Path, kind: str) -> None:
    action, told = OTHERS[kind]
    convert(original, tmp_path / "hf")
    action(tmp_path / "hf")
    found = verify(original, tmp_path / "hf")
    assert any(re.search(told, problem) for problem in found.problems), found


def test_without_logits_a_setting_that_decides_results_is_a_problem(tmp_path: Path, original: Path) -> None:
    convert(original, tmp_path / "hf")
    _eps(tmp_path / "hf")
    found: Verification = verify(original, tmp_path / "hf", Comparison(runs_models=False))
    assert found.problems == ("text_config.rms_norm_eps is 1e-05 and 0.1",)
    assert found.max_logit_difference is None
    edit_json(tmp_path / "hf" / "config.json", text_config={**_text(tmp_path / "hf"), "rms_norm_eps": 1e-5, "initializer_range": 0.5})
    assert verify(original, tmp_path / "hf", Comparison(runs_models=False)).is_same


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 8), ("rope_scaling", {"type": "dynamic", "factor": 2.0})])
def test_what_shows_in_long_prompts_alone_is_a_problem(tmp_path: Path, name: str, value: object) -> None:
    original = make_original(tmp_path / "made", "v1.6 mistral").path
    convert(original, tmp_path / "hf")
    text = {key: kept for key, kept in _text(tmp_path / "hf").items() if key != "rope_parameters"}
    edit_json(tmp_path / "hf" / "config.json", text_config={**text, name: value})
    found = verify(original, tmp_path / "hf", Comparison(logits_atol=1e9))
    assert len(found.problems) == 1
    assert ("window" if name == "sliding_window" else name) in found.problems[0]


def test_what_no_answer_depends_on_is_noted(tmp_path: Path, original: Path) -> None:
    convert(original, tmp_path / "hf")
    unused = [f"vision_tower.vision_model.{name}" for name in ("post_layernorm.bias", "encoder.layers.2.mlp.fc1.weight")]
    for name in unused:
        change(tmp_path / "hf", name, lambda weight: weight + 1)
    found = verify(original, tmp_path / "hf")
    assert found.is_same
    told = f"2 weights that no answer depends on differ: {', '.join(sorted(unused))}"
    assert [note for note in found.notes if "no answer" in note] == [told]
    convert(original, tmp_path / "gguf", Conversion(to="gguf", gguf_type="f32"))
    assert verify(original, tmp_path / "gguf").is_same


def _text(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / "config.json").read_text())["text_config"]
    return values


def test_what_cannot_be_read_is_an_error(tmp_path: Path, original: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        verify(original, tmp_path)
    change(original, LAYER, lambda weight: weight * torch.nan)
    with pytest.raises(CheckpointError, match="NaN"):
        verify(original, original)


def test_the_command_tells_by_its_exit_code(tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(original, tmp_path / "hf")
    assert run(["verify", str(original), str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.endswith("the same model\n")
    change(original, LAYER, lambda weight: weight + 1)
    assert run(["verify", str(original), str(tmp_path / "hf"), "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["same"], values["first_different"]) == (False, f"language_model.{LAYER}")
    assert run(["verify", str(original)]) == 2
    assert run(["verify", str(original), str(tmp_path / "nothing")]) == 3


def test_the_command_checks_a_manifest(tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(original, tmp_path / "hf")
    assert run(["verify", "--manifest", str(tmp_path / "hf")]) == 0
    with (tmp_path / "hf" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    listed = json.loads((tmp_path / "hf" / "manifest.json").read_text())["files"]
    edit_json(tmp_path / "hf" / "manifest.json", files={**listed, "../x": {"bytes": 1, "sha256": ""}})
    assert run(["verify", "--manifest", str(tmp_path / "hf")]) == 1
    told = capsys.readouterr().out
    assert "problem: model.safetensors has other contents than when it was saved\nproblem: ../x lies outside the folder\n" in told
    assert run(["verify", "--manifest", str(original)]) == 1
    assert run(["verify", str(original), "--manifest", str(original)]) == 2


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_streamed_model_computes_the_same_and_keeps_no_weight(tmp_path: Path, is_tied: bool) -> None:
    variant = next(variant for variant in VARIANTS if llama(variant).config.tie_word_embeddings == is_tied)
    folder = save_llava(tmp_path / "model", variant)
    whole, ids = load_core(folder, dtype=torch.float32), torch.tensor([1, 5, 6, 7])
    held: list[int] = []
    with open_checkpoint(folder) as opened, streamed(opened, torch.float32) as core, torch.inference_mode():
        for module in core.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_: held.append(num_held(core)))
        assert torch.equal(logits_of(core, ids), logits_of(whole, ids))
        assert max(held) <= max(weight.numel() for weight in core.parameters())
        assert num_held(core) == 0


def logits_of(core: LlamaCore | LlavaCore, ids: Tensor) -> Tensor:
    context = Packed(torch.tensor([0, len(ids)]))
    return core.logits(core.forward_packed(core.embed(ids), torch.arange(len(ids)), context))


def num_held(core: nn.Module) -> int:
    return sum(weight.numel() for weight in core.parameters() if not weight.is_meta)
