"""checkpoint.survey and llava inspect: what a folder of each layout holds, from headers alone, and what is odd about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.survey import PartFacts, Survey, survey
from llavakit.cli.main import run
from llavakit.errors import CheckpointError
from llavakit.storage.tensors import FilePlace
from tests.folders import edit_json
from tests.meta_files import MetaLlama
from tests.original_folders import OriginalFolder, make_original
from tests.packed_folders import RECIPES, quantise_folder
from tests.tiny import hf_llama, llama, save_llava, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's, of its own making
PARTS = {"language_model", "vision_tower", "multi_modal_projector"}
PICKLES = Sources(allow_pickle=True)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a survey reads a weight; groups of inputs are checked where packed weights are opened."""
    read_into = FilePlace.read_into

    def refuse(place: FilePlace, data: Tensor, offset: int) -> None:
        assert "packed" in str(place.path), "a survey reads headers alone"
        read_into(place, data, offset)

    monkeypatch.setattr(FilePlace, "read_into", refuse)


def names(found: Survey) -> set[str]:
    return {part.name for part in found.parts}


def test_a_llava_hf_folder(tmp_path: Path) -> None:
    found = survey(save_llava(tmp_path / "model"))
    assert (found.layout, found.files, names(found)) == ("llava-hf layout", ("model.safetensors",), PARTS)
    assert found.version is not None
    assert "4.36 to 4.51" in found.version
    assert found.config is not None
    assert found.processor is not None
    assert found.dtypes == {"float32": sum(part.num_tensors for part in found.parts)}
    assert found.oddities == ("the vocabulary has 384 rows for 354 tokens",)


@pytest.mark.parametrize(("kind", "version"), [("v1", "v1"), ("v1.5", "v1.5"), ("v1.6", "v1.6")])
@pytest.mark.parametrize("pickled", [False, True])
def test_original_folders(tmp_path: Path, kind: str, version: str, pickled: bool) -> None:
    made = make_original(tmp_path, kind, pickled=pickled)
    found = survey(made.path, Sources(allow_pickle=pickled))
    assert (found.layout, found.version) == ("original LLaVA's layout", version)
    has_tower = kind == "v1.6"
    assert names(found) - {"image_newline"} == (PARTS if has_tower else PARTS - {"vision_tower"})
    assert found.builds_on == (() if has_tower else (f"the vision tower {tmp_path / 'tower'}",))
    dropped = [oddity for oddity in found.oddities if "rotary frequencies" in oddity]
    assert dropped == ([] if has_tower else ["2 tensors are left out: rotary frequencies are computed from the config"])


def test_an_original_folder_whose_tower_is_nowhere(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1.5")
    edit_json(made.path / "config.json", mm_vision_tower="/no/such/tower")
    found = survey(made.path)
    assert found.config is None
    assert found.builds_on == ("the vision tower /no/such/tower",)
    assert any("--vision-tower names a folder" in oddity for oddity in found.oddities)


def test_metas_files(tmp_path: Path) -> None:
    folder = MetaLlama(num_files=2).save(tmp_path / "meta")
    with pytest.raises(CheckpointError, match=r"allow_pickle.*llava convert-llama-weights"):
        survey(folder)
    found = survey(folder, PICKLES)
    assert (found.layout, names(found)) == ("Meta's own layout", {"language_model"})
    assert found.files == ("consolidated.00.pth", "consolidated.01.pth")


def test_adapters(tmp_path: Path) -> None:
    wrapped = get_peft_model(hf_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True))
    wrapped.save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="some/base")
    found = survey(tmp_path / "adapter")
    assert (found.layout, found.adapter) == ("PEFT adapter", "rsLoRA of rank 4, alpha 8, on 4 modules")
    assert (found.builds_on, names(found), found.config) == (("the model some/base",), {"adapter"}, None)
    hf_llama().save_pretrained(tmp_path / "base")
    assert survey(tmp_path / "adapter", Sources(base=tmp_path / "base")).config is not None


def alone(made: OriginalFolder, name: str, prefix: str = "") -> int:
    """Leave of a folder its projector, in a file of that name; returns how many values that has."""
    weights = {name: weight for name, weight in load_file(made.path / "model.safetensors").items() if "mm_projector" in name}
    (made.path / "model.safetensors").unlink()
    torch.save({prefix + name: weight for name, weight in weights.items()}, made.path / name)
    return sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize(("kind", "num_tensors"), [("v1", 2), ("v1.5", 4)])
def test_projectors_alone(tmp_path: Path, kind: str, num_tensors: int) -> None:
    made = make_original(tmp_path, kind)
    size = alone(made, "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin is a pickle file; where you trust its origin"):
        survey(made.path)
    found = survey(made.path, PICKLES)
    assert (found.layout, found.version, found.files) == ("original LLaVA's projector alone", kind, ("mm_projector.bin",))
    assert found.parts == (PartFacts("multi_modal_projector", num_tensors, size, 4 * size),)
    assert found.builds_on == ("a model that it does not name", f"the vision tower {made.tower}")
    assert (found.dtypes, found.oddities) == ({"float32": num_tensors}, ())
    assert survey(made.path, Sources(base="lmsys/vicuna", allow_pickle=True)).builds_on[0] == "the model lmsys/vicuna"


def test_what_was_trained_beside_an_adapter_is_counted(tmp_path: Path) -> None:
    made = make_original(tmp_path, "v1.5")
    size = alone(made, "non_lora_trainables.bin", "base_model.model.")
    (made.path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    save_file({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(1, 64)}, made.path / "adapter_model.safetensors")
    found = survey(made.path, PICKLES)
    assert found.files == ("adapter_model.safetensors", "non_lora_trainables.bin")
    assert found.parts == (PartFacts("adapter", 1, 64, 256), PartFacts("trained whole", 4, size, 4 * size))
    assert found.dtypes == {"float32": 5}
    found = survey(made.path)
    assert [part.name for part in found.parts] == ["adapter"]
    assert any("non_lora_trainables.bin, a pickle file, was not looked at" in oddity for oddity in found.oddities)


@pytest.mark.parametrize("kind", ["GPTQ act-order", "AWQ"])
def test_packed_weights(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "packed"
    llama().save_pretrained(folder, tokenizer=tiny_tokenizer())
    dense = survey(folder)
    quantise_folder(folder, RECIPES[kind])
    found = survey(folder)
    method, index = ("GPTQ (gptq)", ", with g_idx") if "GPTQ" in kind else ("AWQ (gemm)", "")
    assert found.quantisation == f"{method} of 4 bits, groups of 32, 14 modules{index}"
    assert found.parts[0].num_parameters == dense.parts[0].num_parameters
    assert found.parts[0].num_bytes < dense.parts[0].num_bytes
    assert set(found.dtypes) == {"int32", "float16"}


def _both(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")


def _other_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["strange.weight"] = torch.zeros(1)
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def _narrow(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


ODDITIES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "two formats": (_both, ("pytorch_model.bin or its shards are there too",)),
    "names": (_other_names, ("1 tensors are of no known name: strange.weight", "1 tensors are missing: language_model.model.norm.weight")),
    "shapes": (_narrow, ("1 tensors have other shapes: language_model.model.norm.weight [7], expected [64]",)),
    "another dtype": (
        lambda folder: edit_json(folder / "config.json", torch_dtype="float16"),
        ("config.json says float16, the tensors are float32",),
    ),
    "code": (
        lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "x.Y"}),
        ("config.json names code in the checkpoint",),
    ),
    "no tokenizer": (
        _no_tokenizer,
        ("tokenizer.model; copy the checkpoint's sentencepiece model there",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODDITIES)
def test_what_is_odd_is_told(tmp_path: Path, kind: str) -> None:
    action, told = ODDITIES[kind]
    folder = save_llava(tmp_path / "model")
    action(folder)
    found = survey(folder).oddities
    assert [text for text in told if not any(text in oddity for oddity in found)] == [], found


def test_the_command_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_original(tmp_path, "v1.5")
    assert run(["inspect", str(made.path)]) == 0
    text = capsys.readouterr().out
    assert "builds on      the vision tower" in text
    assert run(["inspect", str(made.path), "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert values["oddities"] == ["2 tensors are left out: rotary frequencies are computed from the config"]
