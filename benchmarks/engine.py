"""What the engine gains, and what it costs: figures of this machine, in one run, A B A B.

miniature    64 mixed requests, half of them about pictures, float32: seconds beside transformers' generate one by one and its padded
             batch (the best of several sizes)
large        the same without pictures on a random Llama of 1.1 thousand million parameters, bfloat16
decode       one sequence on it: a step beside transformers' (the better attention), and beside the bare model without an engine
question     the first token of a second question about a picture beside that of the first, on a LLaVA of it and CLIP's large tower
scheduler    bookkeeping alone: tokens per second of 64 sequences without a model
invariance   what it costs that a row's bits do not depend on the others: against oneDNN's products of any rows and torch's silu

Prompts are ready on both sides, caches are empty at the start of each run, and answers have given lengths; of a padded batch only the
tokens asked for count. Run: python -m benchmarks.engine [--parts miniature large ...] [--rounds 3]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.forward import CONTEXT, NO_TILES, random_core, their_run, twin_of
from benchmarks.harness import RESULTS, alternate, write_result
from llavakit.checkpoint.load import load_core
from llavakit.engine.engine import Engine, EngineSettings
from llavakit.engine.llm import LLM, MINIATURE
from llavakit.engine.request import Request, Terms
from llavakit.engine.runner import page_shape
from llavakit.engine.scheduler import Job, Limits, Row, Scheduler
from llavakit.model.decoder import SwiGlu
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.surgery import fuse, init_weights
from llavakit.model.vision_config import ClipVisionConfig
from llavakit.ops.gate import silu_gate
from llavakit.ops.matmul import PackedWeight
from llavakit.ops.paged import Paged
from llavakit.ops.pages import PAGE, Pages, Rows
from llavakit.processing.processor import LlavaProcessor, Prompt
from llavakit.types import Conversation, SamplingParams
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene

NUM_REQUESTS = 64
BATCHES = (8, 16, 64)
QUESTIONS = ("How many things are there?", "Describe the scene.", "Is there a red circle?", "What is at the top?")
LEAST = {
    "miniature one by one": 3.0,
    "miniature padded batch": 1.3,
    "large one by one": 3.0,
    "large padded batch": 1.3,
    "decode beside transformers": 1.8,
    "decode beside the bare model": 0.95,
    "question": 10.0,
    "scheduler": 200_000,
    "invariance in the miniature's batch": 0.9,
    "invariance in steps of the large model": 0.9,
}
Asked = tuple[Prompt, int]


def main() -> int:
    """Measure the parts asked for, record them beside those of earlier runs; return 1 when a figure is short."""
    parts: Mapping[str, Callable[[int], dict[str, Any]]] = {
        "miniature": miniature,
        "large": large,
        "decode": decode,
        "question": question,
        "scheduler": scheduler,
        "invariance": invariance,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    path = RESULTS / "engine.json"
    rows: dict[str, Any] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    for name in options.parts:
        rows |= parts[name](options.rounds)
        print({key: rows[key] for key in rows if key.startswith(name)}, file=sys.stderr)
    short = [key for key, least in LEAST.items() if key in rows and rows[key]["ratio"] < least]
    write_result("engine", "python -m benchmarks.engine", {"least": LEAST, "short": short, "rows": rows})
    return 1 if short else 0


def mixed(prompts: Sequence[Prompt], seed: int = 0) -> list[Asked]:
    """Give every prompt an answer's length, from 8 to 48 tokens."""
    draw = random.Random(seed)
    return [(prompt, draw.randrange(8, 49)) for prompt in prompts]


def params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def engine_run(core: LlamaCore | LlavaCore, asked: Sequence[Asked], context: int) -> Callable[[], list[float]]:
    """Return a run of all requests through a fresh engine; its seconds."""

    def run() -> list[float]:
        engine = Engine(core, EngineSettings(num_blocks=NUM_REQUESTS * -(-context // PAGE), max_batch=NUM_REQUESTS))
        start = time.perf_counter()
        for prompt, count in asked:
            engine.add(Request(prompt, params(count), Terms(context_len=context, end_ids=frozenset())))
        num_tokens = sum(event.token is not None for event in engine.run())
        seconds = time.perf_counter() - start
        assert num_tokens == sum(count for _, count in asked)
        return [seconds]

    return run


def generate_run(model: Any, asked: Sequence[Asked], batch: int, pad: int) -> Callable[[], list[float]]:
    """Return a run of all requests through transformers' generate, batch by batch, padded on the left."""

    @torch.inference_mode()
    def run() -> list[float]:
        start = time.perf_counter()
        for first in range(0, len(asked), batch):
            rows = asked[first : first + batch]
            longest = max(len(prompt.ids) for prompt, _ in rows)
            ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt, _ in rows])
            mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt, _ in rows])
            most = max(count for _, count in rows)
            tiles = torch.cat([prompt.tiles_N3SS for prompt, _ in rows])
            pictures = {"pixel_values": tiles} if tiles.shape[0] else {}
            model.generate(
                input_ids=ids, attention_mask=mask, **pictures, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=pad
            )
        return [time.perf_counter() - start]

    return run


def throughput(name: str, core: Any, peer: Any, asked: Sequence[Asked], context: int, pad: int, rounds: int) -> dict[str, Any]:
    peers = {"one by one": generate_run(peer, asked, 1, pad)}
    peers |= {f"padded batch of {size}": generate_run(peer, asked, size, pad) for size in BATCHES}
    ours = engine_run(core, asked, context)
    count = sum(count for _, count in asked)
    rows: dict[str, Any] = {}
    for kind in ("one by one", "padded batch"):
        (comparison,) = alternate(ours, {key: run for key, run in peers.items() if key.startswith(kind)}, rounds)
        row = comparison.to_row()
        rows[f"{name} {kind}"] = {**row, "tokens": count, "our_tokens_per_s": round(count / row["ours_s"], 1)}
    return rows


def miniature(rounds: int) -> dict[str, Any]:
    """64 requests on the miniature, every second one about one of 16 pictures."""
    llm = LLM(MINIATURE, dtype="float32", device="cpu")
    peer = LlavaForConditionalGeneration.from_pretrained(MINIATURE, dtype=torch.float32).eval()
    draw = random.Random(0)
    pictures = [to_png(render(draw_scene(draw), 96, 96)) for _ in range(NUM_REQUESTS // 4)]
    conversations = [
        Conversation.ask(QUESTIONS[index % 4], *([pictures[index // 2 % len(pictures)]] if index % 2 else []))
        for index in range(NUM_REQUESTS)
    ]
    asked = mixed([llm.processor.prompt(conversation) for conversation in conversations])
    return throughput("miniature", llm.core, peer, asked, 256, 0, rounds)


@functools.cache
def large_models() -> tuple[LlamaCore, Mapping[str, Any]]:
    core = random_core(torch.bfloat16, "cpu")
    peers = {kind: twin_of(core, kind) for kind in ("sdpa", "eager")}
    for peer in peers.values():
        peer.generation_config.eos_token_id = None
    fuse(core, torch.bfloat16)
    return core, peers


def large(rounds: int) -> dict[str, Any]:
    """64 texts of 16 to 192 tokens on the 1B shape."""
    core, peers = large_models()
    draw = random.Random(0)
    texts = [tuple(draw.randrange(3, 32000) for _ in range(draw.randrange(16, 193))) for _ in range(NUM_REQUESTS)]
    asked = mixed([Prompt(ids, (False,) * len(ids), NO_TILES) for ids in texts])
    return throughput("large", core, peers["sdpa"], asked, 256, 0, max(1, rounds // 3))


def decode(rounds: int) -> dict[str, Any]:
    """One sequence after a prompt of 512 tokens: the median step."""
    core, peers = large_models()
    steps = 24
    ids = torch.randint(3, 32000, (1, 512), generator=torch.Generator().manual_seed(0))
    prompt = Prompt(tuple(ids[0].tolist()), (False,) * 512, NO_TILES)

    def ours() -> Sequence[float]:
        engine = Engine(core, EngineSettings(num_blocks=32, max_batch=1))
        engine.add(Request(prompt, params(steps + 1), Terms(context_len=CONTEXT, end_ids=frozenset())))
        return [median_step(lambda: engine.step(), steps)]

    @torch.inference_mode()
    def bare() -> Sequence[float]:
        pages = engine_pages(core, 32)
        table, row = list(range(32)), list(prompt.ids)
        done = 0

        def step() -> None:
            nonlocal done
            attn = Paged(pages, [Rows(done, len(row), table)])
            h_TD = core.forward_packed(core.embed(torch.tensor(row[done:])), attn.positions_T, attn)
            done = len(row)
            row.append(int(core.logits(h_TD[-1:]).argmax()))

        return [median_step(step, steps)]

    their = {kind: step_of(their_run(peer, ids, steps)) for kind, peer in peers.items()}
    (beside,) = alternate(ours, their, 3 * rounds)
    (overhead,) = alternate(ours, {"bare model": bare}, 3 * rounds)
    return {"decode beside transformers": beside.to_row(), "decode beside the bare model": overhead.to_row()}


def step_of(run: Callable[[], Sequence[float]]) -> Callable[[], Sequence[float]]:
    return lambda: run()[1:]


def engine_pages(core: LlamaCore | LlavaCore, num_pages: int) -> Pages:
    weight = core.get_input_embeddings().weight
    return Pages(page_shape(core), num_pages, weight.dtype, weight.device)


def median_step(step: Callable[[], object], steps: int) -> float:
    """Run a prefill and so many steps; the median of the latter's seconds."""
    step()
    times = [time.perf_counter()]
    for _ in range(steps):
        step()
        times.append(time.perf_counter())
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def question(rounds: int) -> dict[str, Any]:
    """Seconds to the first token of a first and a second question about a picture."""
    del rounds
    rows = {}
    for name, llm, size in (("question", large_llava(), (640, 480)), ("question to the miniature", LLM(MINIATURE, device="cpu"), (96, 96))):
        firsts: list[float] = []
        seconds: list[float] = []
        for seed in range(4):
            picture = to_png(render(draw_scene(random.Random(seed)), *size))
            for times, text in ((firsts, QUESTIONS[0]), (seconds, QUESTIONS[1])):
                start = time.perf_counter()
                stream = llm.stream(Conversation.ask(text, picture), params(2))
                next(stream)
                times.append(time.perf_counter() - start)
                list(stream)
        pairs = list(zip(firsts, seconds, strict=True))[1:]
        rows[name] = {
            "first_s": round(statistics.median(first for first, _ in pairs), 4),
            "second_s": round(statistics.median(second for _, second in pairs), 4),
            "ratio": round(statistics.median(first / second for first, second in pairs), 2),
        }
    return rows


def large_llava() -> LLM:
    """Build a LLaVA of CLIP's large tower for 336 pixels and the 1B shape, bfloat16; the processor is the miniature's at that size."""
    small = LLM(MINIATURE, device="cpu").processor
    assert isinstance(small, LlavaProcessor)
    text = random_core(torch.bfloat16, "cpu").config
    vision = ClipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    core = LlavaCore(LlavaConfig(text_config=text, vision_config=vision, image_token_index=small.image_token_id))
    init_weights(core, 0.02, torch.Generator().manual_seed(0))
    core = core.to(torch.bfloat16).eval()
    fuse(core, torch.bfloat16)
    images = replace(small.image_processor, size_px=336, crop_px=336)
    return LLM.of(core, replace(small, image_processor=images, patch_size=14), max_batch=2)


def scheduler(rounds: int) -> dict[str, Any]:
    """Plan and account for 64 sequences without a model."""

    def run() -> float:
        planner = Scheduler(Limits(num_blocks=64 * 16, block_tokens=PAGE, max_rows=64, step_tokens=512))
        for number in range(64):
            planner.add(Job(number, [Row([number] * 40)]))
        count = 0
        start = time.perf_counter()
        for _ in range(400):
            for work in planner.step():
                planner.computed(work.row, work.job, work.stop)
                count += work.stop - work.first
                if work.row.num_computed == len(work.row.ids):
                    work.row.ids.append(count)
        return count / (time.perf_counter() - start)

    return {"scheduler": {"ratio": round(statistics.median(run() for _ in range(3 * rounds))), "unit": "tokens per second"}}


def invariance(rounds: int) -> dict[str, Any]:
    """The same work with and without what makes rows independent of each other."""
    llm = LLM(MINIATURE, dtype="float32", device="cpu")
    free = load_core(MINIATURE, dtype=torch.float32)
    free_rows(free, torch.float32)
    asked = mixed([llm.processor.prompt(Conversation.ask(QUESTIONS[index % 4])) for index in range(NUM_REQUESTS)])
    one = [(Prompt(tuple(range(3, 67)), (False,) * 64, NO_TILES), 24)]
    large_free = random_core(torch.bfloat16, "cpu")
    free_rows(large_free, torch.bfloat16)
    rows = {}
    for name, ours, theirs, work in (
        ("in the miniature's batch", llm.core, free, asked),
        ("in steps of the large model", large_models()[0], large_free, one),
    ):
        (comparison,) = alternate(engine_run(ours, work, 256), {"free rows": engine_run(theirs, work, 256)}, 3 * rounds)
        rows[f"invariance {name}"] = comparison.to_row()
    return rows


class FreeWeight(PackedWeight):
    """oneDNN's product of as many rows as there are, without the promise."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O, use_kernels=False)

    def multiply(self, x_MI: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_MI, self._weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def free_rows(core: LlamaCore | LlavaCore, dtype: torch.dtype) -> None:
    """Make a model ready without the promise: such products, torch's silu, and layers as they are."""
    with mock.patch("llavakit.model.linear.PackedWeight", FreeWeight), mock.patch("llavakit.model.surgery.load_kernels", return_value=None):
        fuse(core, dtype)
    for module in core.modules():
        if isinstance(module, SwiGlu):
            module.gate = silu_gate


if __name__ == "__main__":
    sys.exit(main())
