"""The recipe of the embedded miniature: LLaVA's own steps at a millionth of the cost.

Owns: the model's shape, the stages, their hyperparameters, and the export. Everything is made from seeds.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llavakit.checkpoint.hf import save_checkpoint
from llavakit.config import run_config_to_dict
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.surgery import init_weights
from llavakit.model.vision_config import ClipVisionConfig
from llavakit.ops.precision import faster_dtype
from llavakit.processing.chat import TEMPLATES
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.reproduce.accuracy import write_examination
from llavakit.reproduce.lessons import Lessons
from llavakit.reproduce.stages import Stage, StageContext
from llavakit.reproduce.tower import TowerSource, TowerTrainer
from llavakit.reproduce.vocabulary import train_tokenizer
from llavakit.storage.documents import read_json, write_json
from llavakit.storage.tensors import TensorFolder, write_tensors
from llavakit.training.config import LoopConfig, OptimConfig
from llavakit.training.packing import PackedSource
from llavakit.training.trainer import train

__all__ = ["miniature_config", "miniature_stages"]

_PIECES = 768
_IMAGE_TOKEN, _PAD_TOKEN = "<image>", "<pad>"
_PRECISION_FILE = "precision.json"
_VOCAB = 832  # pieces, <image> and <pad>, filled up to a multiple of 64 as llava-hf does
_TRAINED = ("tower", "language", "align", "instruct")
_SEED = 20_240_000
_SEED_STRIDE = 1 << 36  # between the stages' streams of samples
_NO_SPLIT = 1 << 62


def miniature_config() -> LlavaConfig:
    """Describe the miniature: 6.95 million parameters in LLaVA-1.5's architecture."""
    vision = ClipVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
        projection_dim=256,
    )
    text = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=_PIECES, pad_token_id=_PIECES + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Training:
    """A training stage: its run and how many samples make a batch."""

    run: LoopConfig
    batch_size: int
    stream: int
    """Number of the stage's stream of samples."""


def miniature_stages(*, scale: float = 1.0, num_scenes: int = 5000) -> list[Stage]:
    """List the stages; scale multiplies the steps of each training stage (for tests and quick looks)."""
    projector, language_model = "multi_modal_projector.*", "language_model.*"
    return [
        Stage("precision", {}, (), _choose_precision),
        Stage("vocabulary", {"pieces": _PIECES, "seed": _SEED}, (), _train_vocabulary),
        _training_stage("tower", (), _train_tower, _Training(run=_run(4400, 2e-3, scale), batch_size=24, stream=1)),
        _training_stage("language", ("vocabulary",), _train_language, _Training(run=_run(600, 2e-3, scale), batch_size=12, stream=2)),
        _training_stage(
            "align",
            ("vocabulary", "tower", "language"),
            _train_align,
            _Training(run=_run(400, 2e-3, scale, (projector,)), batch_size=16, stream=3),
        ),
        _training_stage(
            "instruct",
            ("vocabulary", "align"),
            _train_instruct,
            _Training(run=_run(4000, 1.5e-3, scale, (projector, language_model)), batch_size=12, stream=4),
        ),
        Stage("export", {}, ("vocabulary", "instruct"), _export),
        Stage("examine", {"scenes": num_scenes}, ("export", *_TRAINED), functools.partial(_examine, num_scenes)),
    ]


def _run(steps: int, lr: float, scale: float, trainable: tuple[str, ...] = ("*",)) -> LoopConfig:
    steps = max(2, round(steps * scale))
    optim = OptimConfig(
        name="muon", lr=lr, weight_decay=0.05, beta2=0.98, clip_norm=1.0, warmup_steps=max(1, steps // 40), schedule="wsd", decay_share=0.4
    )
    return LoopConfig(steps=steps, optim=optim, trainable=trainable)


def _training_stage(name: str, inputs: tuple[str, ...], run: Callable[[_Training, StageContext], None], training: _Training) -> Stage:
    settings = {**run_config_to_dict(training), "model": miniature_config().to_dict(), "seed": _SEED}
    return Stage(name, settings, ("precision", *inputs), functools.partial(_run_training, run, training))


def _run_training(run: Callable[[_Training, StageContext], None], training: _Training, context: StageContext) -> None:
    """Run a training stage in the dtype that this machine is fast in."""
    compute_dtype = read_json(context.inputs["precision"] / _PRECISION_FILE)["compute_dtype"]
    run(replace(training, run=replace(training.run, compute_dtype=compute_dtype)), context)


def _choose_precision(context: StageContext) -> None:
    write_json(context.out / _PRECISION_FILE, {"compute_dtype": faster_dtype()})


def _train_vocabulary(context: StageContext) -> None:
    system = TEMPLATES["v1"].system
    assert system is not None
    (context.out / "tokenizer.model").write_bytes(train_tokenizer(_PIECES, system, _SEED))


def _train_tower(training: _Training, context: StageContext) -> None:
    config = miniature_config().vision_config
    model = TowerTrainer(config)
    _fill(model, training.stream)
    patches_per_side = config.image_size // config.patch_size
    source = TowerSource(_first_sample(training), training.batch_size, _image_processor(), patches_per_side)
    train(model, source, training.run, context.scratch)
    _finish(context, {name: weight for name, weight in model.named_parameters() if name.startswith("vision_tower.")})


def _train_language(training: _Training, context: StageContext) -> None:
    model = LlamaCore(miniature_config().text_config)
    _fill(model, training.stream)
    lessons = Lessons("text", _first_sample(training), _processor(context, "v1"))
    train(model, PackedSource(lessons, training.batch_size), training.run, context.scratch)
    _finish(context, dict(model.named_parameters(prefix="language_model")))


def _train_align(training: _Training, context: StageContext) -> None:
    model = LlavaCore(miniature_config())
    _fill(model, training.stream)
    _load(model, context.inputs["tower"], context.inputs["language"])
    lessons = Lessons("captions", _first_sample(training), _processor(context, "plain"))
    train(model, PackedSource(lessons, training.batch_size), training.run, context.scratch)
    _finish(context, dict(model.named_parameters()))


def _train_instruct(training: _Training, context: StageContext) -> None:
    model = LlavaCore(miniature_config())
    _load(model, context.inputs["align"])
    lessons = Lessons("instructions", _first_sample(training), _processor(context, "v1"))
    train(model, PackedSource(lessons, training.batch_size), training.run, context.scratch)
    _finish(context, dict(model.named_parameters()))


def _export(context: StageContext) -> None:
    model = LlavaCore(miniature_config())
    _load(model, context.inputs["instruct"])
    save_checkpoint(model.to(torch.bfloat16), context.out, processor=_processor(context, "v1"))


def _examine(num_scenes: int, context: StageContext) -> None:
    curves = {name: context.inputs[name] / "train_loss.png" for name in _TRAINED}
    write_examination(context.inputs["export"], context.out, context.scratch, num_scenes=num_scenes, curves=curves)


def _processor(context: StageContext, template: str) -> LlavaProcessor:
    config = miniature_config()
    tokenizer = LlamaTokenizer(
        context.inputs["vocabulary"] / "tokenizer.model",
        added_tokens={_IMAGE_TOKEN: _PIECES, _PAD_TOKEN: _PIECES + 1},
        pad_token=_PAD_TOKEN,
    )
    return LlavaProcessor(
        tokenizer=tokenizer,
        image_processor=_image_processor(),
        template=TEMPLATES[template],
        image_token_id=_PIECES,
        patch_size=config.vision_config.patch_size,
    )


def _image_processor() -> ImageProcessor:
    side = miniature_config().vision_config.image_size
    return ImageProcessor(size_px=side, crop_px=side, aspect="pad")


def _first_sample(training: _Training) -> int:
    return _SEED + training.stream * _SEED_STRIDE


def _fill(model: nn.Module, stream: int) -> None:
    init_weights(model, 0.02, torch.Generator().manual_seed(_SEED + stream))


def _load(model: nn.Module, *folders: Path) -> None:
    """Copy the weights that the folders hold into the model."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for folder in folders:
            tensors = TensorFolder(folder)
            for name in tensors.in_file_order():
                weights[name].copy_(tensors.read(name))
            tensors.close()


def _finish(context: StageContext, weights: Mapping[str, Tensor]) -> None:
    """Write a stage's weights, and copy its metrics and loss curve beside them."""
    specs = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    write_tensors(context.out, specs, iter(weights.items()), max_shard_bytes=_NO_SPLIT)
    for name in ("config.json", "metrics.jsonl", "loss.png"):
        shutil.copyfile(context.scratch / name, context.out / f"train_{name}")
