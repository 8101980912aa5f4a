"""How fast training steps are next to transformers' Trainer (with peft for LoRA): same weights, samples and machine, in one run, A B A B.

A small LLaVA (random; on a GPU LLaVA-1.5-7B's shape, for LoRA and the projector) on samples whose lengths are like mix665K's, a quarter as
long: nine of ten with a picture. Stage 1 trains the projector on captions, full projector and language model, lora rank 16 in every
product of the layers. Ours packs to a token budget; the peer pads batches of 8 samples, in random order as published, and grouped by
length (its fastest), in float32 and bfloat16, and the faster dtype counts on both sides. 16 samples make a step everywhere.
Memory is the most that one run took in a process of its own. Run: python -m benchmarks.train_step [--kinds stage1 full lora] [--rounds 3]
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from benchmarks.harness import alternate, write_result
from llavakit.checkpoint.hf import save_folder
from llavakit.checkpoint.load import load_core
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.lora_config import LoraConfig
from llavakit.model.surgery import add_lora, freeze, init_weights
from llavakit.model.vision_config import ClipVisionConfig
from llavakit.training.config import DataConfig, LoopConfig, OptimConfig, SaveConfig
from llavakit.training.data import Sample
from llavakit.training.flops import CoreFlops, peak_flops
from llavakit.training.objectives import COMPUTE_DTYPES, PackedLoss
from llavakit.training.optim import build_optimizers
from llavakit.training.packing import BestFitSource, Part
from llavakit.training.reporting import StepRecord
from llavakit.training.trainer import Trainer as OurTrainer

NUM_SAMPLES, SAMPLES_PER_STEP, PER_BATCH = 64, 16, 8
TOKENS_PER_BATCH = 2048
IMAGE_TOKEN = 4090
NO_TILES = torch.empty(0, 3, 1, 1)
KINDS = ("stage1", "full", "lora")
TRAINABLE = {
    "stage1": ("multi_modal_projector.*",),
    "full": ("multi_modal_projector.*", "language_model.*"),
    "lora": ("*.lora_A", "*.lora_B"),
}
Precision = Literal["float32", "bfloat16"]
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", nargs=2, metavar=("KIND", "WHO"), help="run one side once and print its seconds and memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_model(Path(folder) / "model")
        if options.alone:
            kind, who = options.alone
            seconds = sides(kind, checkpoint)[who]()[0]
            print(json.dumps({"seconds": seconds, "gb": most_memory() / 1e6}))
            return
        rows: dict[str, Any] = {}
        for kind in options.kinds:
            rows |= measure(kind, checkpoint, options.rounds)
            print({name: row for name, row in rows.items() if name.startswith(kind)}, file=sys.stderr)
    write_result("train_step", "python -m benchmarks.train_step", {"samples": NUM_SAMPLES, "rows": rows})


def measure(kind: str, checkpoint: Path, rounds: int) -> dict[str, Any]:
    """Compare one kind with the peer in the published order and in its fastest."""
    runs = sides(kind, checkpoint)
    ours = {who: run for who, run in runs.items() if who.startswith("ours")}
    best = min(ours, key=lambda who: min(ours[who]()[0] for _ in range(2)))
    flops = total_flops(kind, checkpoint)
    precision: Precision = "bfloat16" if best.endswith("bfloat16") else "float32"
    peak = peak_flops(torch.device("cpu"), COMPUTE_DTYPES[precision])
    rows: dict[str, Any] = {}
    for order in ("random", "grouped"):
        peers = {who: run for who, run in runs.items() if order in who}
        (comparison,) = alternate(ours[best], peers, rounds)
        row = comparison.to_row()
        rows[f"{kind}, peer in {order} order"] = {
            **row,
            "ours": best,
            "our_samples_per_s": round(NUM_SAMPLES / row["ours_s"], 2),
            "our_mfu": round(flops / row["ours_s"] / peak, 3),
            "peer_mfu": round(flops / row["peers_s"][row["best_peer"]] / peak, 3),
            "our_gb": alone(kind, best)["gb"],
            "peer_gb": alone(kind, row["best_peer"])["gb"],
            "our_breakdown_s": breakdown(kind, checkpoint, precision),
        }
    return rows


def breakdown(kind: str, checkpoint: Path, precision: Precision) -> dict[str, float]:
    """Return where the seconds of an epoch of ours go."""
    core = our_core(kind, checkpoint, precision)
    source, loss, dtype = our_source(kind, core), PackedLoss(precision), COMPUTE_DTYPES[precision]
    weights = {name: weight for name, weight in core.named_parameters() if weight.requires_grad}
    optimizers = build_optimizers(weights, OptimConfig(lr=1e-4), dtype=dtype)
    seconds = dict.fromkeys(("batches", "tower", "forward", "backward", "optimizer"), 0.0)

    def timed(part: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        done = work()
        seconds[part] += time.perf_counter() - began
        return done

    num_batches = source.num_batches(0)
    per_step = max(1, round(num_batches * SAMPLES_PER_STEP / NUM_SAMPLES))
    for number in range(num_batches):
        batch = timed("batches", functools.partial(source.batch, number)).batch
        if batch.pixels_N3SS is not None:
            seen = timed("tower", functools.partial(core.see, batch.pixels_N3SS, dtype=dtype))
            batch = replace(batch, pixels_N3SS=None, seen_NPD=seen)
        terms = timed("forward", functools.partial(loss.loss, core, batch))
        timed("backward", terms.sum.backward)
        if (number + 1) % per_step == 0:
            for optimizer in optimizers:
                timed("optimizer", optimizer.step)
                optimizer.zero_grad()
    return {part: round(value, 3) for part, value in seconds.items()}


def most_memory() -> int:
    """Return the most kilobytes that this program took; what getrusage says begins with those of its parent."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(lines["VmHWM"].split()[0])


def alone(kind: str, who: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.train_step", "--alone", kind, who], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: round(value, 3) for name, value in found.items()}


def sides(kind: str, checkpoint: Path) -> dict[str, Callable[[], Sequence[float]]]:
    runs: dict[str, Callable[[], Sequence[float]]] = {}
    for precision in ("float32", "bfloat16"):
        runs[f"ours, {precision}"] = functools.partial(our_run, kind, checkpoint, precision)
        for order in ("random", "grouped"):
            runs[f"transformers, {order}, {precision}"] = functools.partial(their_run, kind, checkpoint, order, precision)
    return runs


# The model and the samples


def save_model(folder: Path) -> Path:
    text = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, max_position_embeddings=2048
    )
    vision = ClipVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=168, patch_size=14
    )
    core = LlavaCore(LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN))
    init_weights(core, 0.02, torch.Generator().manual_seed(0))
    save_folder(core, folder)
    return folder


class Samples(Dataset[dict[str, Any]]):
    """The samples of a kind, ready made: for ours by sample(i), for the peer by item."""

    def __init__(self, kind: str, core: LlavaCore) -> None:
        draw, grid = random.Random(0), core.config.image_grid
        num_patches = grid.rows * grid.cols
        self.samples: list[Sample] = []
        for number in range(NUM_SAMPLES):
            has_picture = kind == "stage1" or draw.random() < 0.9
            slots = num_patches if has_picture else 0
            answer = draw.randint(6, 14) if kind == "stage1" else min(360, (20 + int(draw.lognormvariate(5, 0.7))) // 4)
            question = 0 if kind == "stage1" else draw.randint(8, 16)
            ids = (1, *[IMAGE_TOKEN] * slots, *(draw.randrange(3, 4000) for _ in range(question + answer)))
            mask = (False,) * (1 + slots + question) + (True,) * answer
            generator = torch.Generator().manual_seed(number)
            tiles = torch.rand(1, 3, 168, 168, generator=generator) if has_picture else NO_TILES
            self.samples.append(Sample(ids, mask, tiles, (grid,) * has_picture))

    def sample(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        labels = [token if counts else -100 for token, counts in zip(sample.ids, sample.loss_mask, strict=True)]
        return {"input_ids": list(sample.ids), "labels": labels, "tiles": sample.tiles_N3SS}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[filler] * (longest - len(row[name]))] for row in rows])

    ids = padded("input_ids", 0)
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    tiles = [row["tiles"] for row in rows if row["tiles"].shape[0]]
    pictures = {"pixel_values": torch.cat(tiles)} if tiles else {}
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100), **pictures}


# Ours


class Silent:
    """A reporter that keeps when the first step began and the last ended."""

    def begin(self, first_step: int, steps: int) -> None:  # noqa: ARG002 - a reporter's
        self.began = time.perf_counter()

    def record(self, record: StepRecord) -> None:
        self.ended, self.loss = time.perf_counter(), record.loss

    def sync(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Nothing is open."""


def our_core(kind: str, checkpoint: Path, precision: Precision) -> LlavaCore:
    core = load_core(checkpoint)
    assert isinstance(core, LlavaCore)
    if kind == "lora":
        add_lora(core, LoraConfig(rank=16, alpha=32.0), torch.Generator().manual_seed(0))
    freeze(core, TRAINABLE[kind])
    for weight in core.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else COMPUTE_DTYPES[precision])
    return core


def our_source(kind: str, core: LlavaCore) -> BestFitSource:
    samples = Samples(kind, core)
    data = DataConfig(tokens_per_batch=TOKENS_PER_BATCH, max_sample_tokens=1024)
    return BestFitSource([Part("rows", samples, [sample.num_tokens for sample in samples.samples])], data)


def our_run(kind: str, checkpoint: Path, precision: Precision) -> Sequence[float]:
    core = our_core(kind, checkpoint, precision)
    source = our_source(kind, core)
    num_batches = source.num_batches(0)
    steps = NUM_SAMPLES // SAMPLES_PER_STEP
    per_step = max(1, round(num_batches / steps))
    config = LoopConfig(
        steps=num_batches // per_step,
        optim=OptimConfig(lr=1e-4, warmup_share=0.03),
        trainable=TRAINABLE[kind],
        compute_dtype=precision,
        microbatches=per_step,
        workers=0,
        save=SaveConfig(every_s=1e9),
    )
    reporter = Silent()
    with tempfile.TemporaryDirectory() as folder:
        OurTrainer(core, PackedLoss(precision), source, config, reporter, Path(folder)).run()
    num_seen = sum(len(source.packs(0)[number]) for number in range(config.steps * per_step))
    return [(reporter.ended - reporter.began) * NUM_SAMPLES / num_seen]


def total_flops(kind: str, checkpoint: Path) -> float:
    """Count the operations of an epoch without padding."""
    core = our_core(kind, checkpoint, "float32")
    source, count = our_source(kind, core), CoreFlops(core)
    return sum(count.batch(source.batch(number).batch) for number in range(source.num_batches(0)))


# The peer


class Clock(TrainerCallback):  # type: ignore[misc]
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()


def their_run(kind: str, checkpoint: Path, order: str, precision: Precision) -> Sequence[float]:
    core = load_core(checkpoint)
    assert isinstance(core, LlavaCore)
    samples = Samples(kind, core)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    if kind == "lora":
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(model, PeftConfig(r=16, lora_alpha=32, target_modules=targets))
    else:
        for name, weight in model.named_parameters():
            weight.requires_grad_("multi_modal_projector" in name or (kind == "full" and "vision_tower" not in name))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=PER_BATCH,
            gradient_accumulation_steps=SAMPLES_PER_STEP // PER_BATCH,
            num_train_epochs=1,
            learning_rate=1e-4,
            warmup_steps=1,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            max_grad_norm=0.0,
            bf16=precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length" if order == "grouped" else "random",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collate, callbacks=[clock]).train()
    return [clock.ended - clock.began]


if __name__ == "__main__":
    main()
