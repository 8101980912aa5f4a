"""What the engine does on a GPU with random weights of LLaVA-1.5-7B's shape, in one run, A B A B.

decode       one and 32 sequences of 640 tokens, bfloat16: the median step with CUDA graphs, beside the engine without them and transformers
             over its growing cache; one also beside transformers compiled (mode reduce-overhead) over its static cache
throughput   128 requests of 600 to 700 tokens that want 16 to 128 more, beside transformers' generate in padded batches
train        a step on 16 samples of 576 image tokens and 24 to 400 of an answer: the projector alone, and LoRA of rank 16 in every product:
             samples per second, share of the peak (tower included, no padding), memory
quantised    pictures and questions to the whole LLaVA in int8 and NF4 on a card of which only 16 GB are free: memory and tokens per second

Prompts are ready on both sides. Run: python -m benchmarks.gpu [--parts decode ...] [--rounds 3]
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import StaticCache

from benchmarks.engine import Asked, params
from benchmarks.forward import NO_TILES, twin_of
from benchmarks.harness import RESULTS, alternate, write_result
from llavakit.engine.engine import Engine, EngineSettings
from llavakit.engine.llm import LLM, MINIATURE
from llavakit.engine.request import Request, Terms
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.lora_config import LoraConfig
from llavakit.model.surgery import add_lora, attend_by, compile_layers, freeze, quantize, recompute_layers
from llavakit.model.vision_config import ClipVisionConfig
from llavakit.ops.pages import PAGE
from llavakit.ops.segmented import Segmented
from llavakit.processing.processor import LlavaProcessor, Prompt
from llavakit.training.config import DataConfig, OptimConfig
from llavakit.training.data import Sample, moved
from llavakit.training.flops import CoreFlops, peak_flops
from llavakit.training.optim import build_optimizers
from llavakit.training.packing import BestFitSource, Part
from llavakit.training.recipes import LORA
from llavakit.types import Conversation, SamplingParams
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene

CONTEXT = 4096
PROMPT, STEPS = 640, 48
CARD_BYTES = 16 << 30
CUDA = torch.device("cuda")


def main() -> int:
    """Measure the parts asked for, and record them beside those of earlier runs."""
    parts: Mapping[str, Callable[[int], dict[str, Any]]] = {
        "decode": decode,
        "throughput": throughput,
        "quantised": quantised,
        "train": train,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    path = RESULTS / "engine_gpu.json"
    rows: dict[str, Any] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    for name in options.parts:
        rows |= parts[name](options.rounds)
        write_result("engine_gpu", "python -m benchmarks.gpu", {"rows": rows})
        print(name, "done", file=sys.stderr)
    return 0


def text_config() -> LlamaConfig:
    return LlamaConfig(vocab_size=32064, max_position_embeddings=CONTEXT)


def filled(core: nn.Module, device: torch.device) -> Any:
    """Give a model that was built without memory random weights in bfloat16, which are drawn on the GPU."""
    core = core.to(torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(CUDA).manual_seed(0)
    with torch.no_grad():
        for name, weight in core.named_parameters():
            is_norm = "norm" in name.rpartition(".")[0].rpartition(".")[2] and name.endswith("weight")
            weight.copy_(torch.empty(weight.shape, device=CUDA).normal_(float(is_norm), 0.0 if is_norm else 0.02, generator=generator))
    return core


@functools.cache
def llama() -> LlamaCore:
    with torch.device("meta"):
        core = LlamaCore(text_config())
    return filled(core, CUDA)  # type: ignore[no-any-return]


def engine_of(core: LlamaCore | LlavaCore, num_rows: int, *, has_graphs: bool) -> Engine:
    engine = Engine(
        core,
        EngineSettings(num_blocks=num_rows * -(-(PROMPT + STEPS + 1) // PAGE), max_batch=num_rows, step_tokens=4096, prefix_cache=False),
    )
    if not has_graphs:
        engine.runner.graphs = None
    return engine


def request(prompt: Prompt, count: int) -> Request:
    return Request(prompt, params(count), Terms(context_len=CONTEXT, end_ids=frozenset()))


def prompts(num_rows: int, least: int, most: int) -> list[Prompt]:
    draw = random.Random(0)
    texts = [tuple(draw.randrange(3, 32000) for _ in range(draw.randint(least, most))) for _ in range(num_rows)]
    return [Prompt(ids, (False,) * len(ids), NO_TILES) for ids in texts]


def our_decode(engine: Engine, asked: Sequence[Prompt]) -> Callable[[], Sequence[float]]:
    def run() -> Sequence[float]:
        for prompt in asked:
            engine.add(request(prompt, STEPS + 1))
        num_events, times = 0, []
        while engine.has_work:
            start = time.perf_counter()
            found = len(engine.step())
            num_events += found
            times += [time.perf_counter() - start] * (found == len(asked))
        assert num_events == len(asked) * (STEPS + 1)
        return [statistics.median(times[-STEPS:])]

    return run


def their_decode(model: Any, asked: Sequence[Prompt], *, compiled: Any = None) -> Callable[[], Sequence[float]]:
    """Return transformers' step over its growing cache, or a compiled one over its static cache."""
    ids = torch.tensor([prompt.ids for prompt in asked], device=CUDA)
    cache = None if compiled is None else StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 16)

    @torch.inference_mode()
    def run() -> Sequence[float]:
        nonlocal cache
        past: Any = None
        if cache is not None:
            cache.reset()
            past = cache
        output = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = output.past_key_values
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        step = model if compiled is None else compiled
        times = []
        for index in range(STEPS):
            start = time.perf_counter()
            position = torch.tensor([PROMPT + index], device=CUDA)
            places = {"position_ids": position.expand(len(asked), 1)} if compiled is not None else {}
            tokens = step(tokens, past_key_values=past, use_cache=True, logits_to_keep=1, **places).logits[:, -1].argmax(-1, keepdim=True)
            tokens.tolist()
            times.append(time.perf_counter() - start)
        return [statistics.median(times)]

    return run


def decode(rounds: int) -> dict[str, Any]:
    core = llama()
    twin = twin_of(core, "sdpa")
    rows: dict[str, Any] = {}
    for num_rows in (32, 1):
        asked = prompts(num_rows, PROMPT, PROMPT)
        ours, bare = (our_decode(engine_of(core, num_rows, has_graphs=has_graphs), asked) for has_graphs in (True, False))
        peers = {"transformers": their_decode(twin, asked)}
        if num_rows == 1:
            peers["transformers compiled, static cache"] = their_decode(twin, asked, compiled=torch.compile(twin, mode="reduce-overhead"))
        for name, runs in (("no graphs", {"engine without graphs": bare}), ("transformers", peers)):
            (comparison,) = alternate(ours, runs, rounds)
            tokens = {"tokens_per_s": round(num_rows / statistics.median(comparison.ours))}
            rows[f"decode {num_rows} beside {name}"] = {**comparison.to_row(), **tokens}
            print(rows, file=sys.stderr, flush=True)
    return rows


def throughput(rounds: int) -> dict[str, Any]:
    core = llama()
    twin = twin_of(core, "sdpa")
    draw = random.Random(1)
    asked = [(prompt, draw.randint(16, 128)) for prompt in prompts(128, 600, 700)]
    runs = {f"transformers, padded batch of {size}": padded_run(twin, asked, size) for size in (32, 64)}
    (comparison,) = alternate(engine_run(core, asked), runs, max(1, rounds // 2))
    count = sum(count for _, count in asked)
    return {"throughput": {**comparison.to_row(), "tokens_per_s": round(count / statistics.median(comparison.ours))}}


def engine_run(core: LlamaCore, asked: Sequence[Asked]) -> Callable[[], list[float]]:
    blocks = 64 * -(-(700 + 128) // PAGE)
    engine = Engine(core, EngineSettings(num_blocks=blocks, max_batch=64, step_tokens=4096, prefix_cache=False))

    def run() -> list[float]:
        start = time.perf_counter()
        for prompt, count in asked:
            engine.add(request(prompt, count))
        assert sum(event.token is not None for event in engine.run()) == sum(count for _, count in asked)
        return [time.perf_counter() - start]

    return run


def padded_run(model: Any, asked: Sequence[Asked], batch: int) -> Callable[[], list[float]]:
    @torch.inference_mode()
    def run() -> list[float]:
        start = time.perf_counter()
        for first in range(0, len(asked), batch):
            rows = asked[first : first + batch]
            longest, most = max(len(prompt.ids) for prompt, _ in rows), max(count for _, count in rows)
            ids = torch.tensor([[0] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt, _ in rows], device=CUDA)
            mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt, _ in rows], device=CUDA)
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
            ).tolist()
        return [time.perf_counter() - start]

    return run


def quantised(rounds: int) -> dict[str, Any]:
    """Eight questions about eight pictures, twice: weights on the GPU, the most memory that was taken, tokens per second."""
    del rounds
    rows: dict[str, Any] = {}
    kinds: tuple[Literal["int8", "nf4"], ...] = ("int8", "nf4")
    for kind in kinds:
        llama.cache_clear()
        torch.cuda.empty_cache()
        core = llava()
        start = time.perf_counter()
        quantize(core, kind, CUDA)
        seconds = time.perf_counter() - start
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated()
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(max(0, free + torch.cuda.memory_reserved() - CARD_BYTES), dtype=torch.uint8, device=CUDA)
        held = torch.cuda.memory_allocated() - weights
        llm = LLM.of(core, processor(), max_batch=8)
        torch.cuda.reset_peak_memory_stats()
        pictures = [to_png(render(draw_scene(random.Random(seed)), 640, 480)) for seed in range(8)]
        conversations = [Conversation.ask("What is in the picture?", picture) for picture in pictures]
        for _ in range(2):
            start = time.perf_counter()
            found = llm.chat(conversations, SamplingParams(max_tokens=32, ignore_eos=True))
            elapsed = time.perf_counter() - start
        assert all(len(completion.ids) == 32 for completion in found), [completion.error for completion in found]
        start = time.perf_counter()
        one = llm.chat(conversations[0], SamplingParams(max_tokens=33, ignore_eos=True))
        rows[f"quantised {kind}"] = {
            "quantised_in_s": round(seconds, 1),
            "weights_gb": round(weights / 1e9, 2),
            "peak_gb": round((torch.cuda.max_memory_allocated() - held) / 1e9, 2),
            "cache_blocks": llm.engine.settings.num_blocks,
            "graph_steps": 0 if llm.engine.runner.graphs is None else llm.engine.runner.graphs.num_replays,
            "tokens_per_s_of_8": round(8 * 32 / elapsed, 1),
            "tokens_per_s_alone": round(len(one.ids) / (time.perf_counter() - start), 1),
        }
        del llm, core, ballast
    return rows


def train(rounds: int) -> dict[str, Any]:
    """Steps of packed batches of 8,192 tokens: the median of so many after the first two, which compile."""
    rows: dict[str, Any] = {}
    for kind in ("projector", "lora"):
        llama.cache_clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        core = llava().to(CUDA)
        if kind == "lora":
            add_lora(core, LoraConfig(rank=16, alpha=32.0), torch.Generator().manual_seed(0))
        freeze(core, ("multi_modal_projector.*",) if kind == "projector" else LORA)
        for weight in core.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        recompute_layers(core)
        attend_by(core, Segmented)
        compile_layers(core)
        source = BestFitSource([Part("rows", Rows576(core), Rows576.lengths())], DataConfig(tokens_per_batch=8192, max_sample_tokens=2048))
        batches = [moved(source.batch(number).batch, CUDA) for number in range(source.num_batches(0))]
        optimizers = build_optimizers(
            {name: weight for name, weight in core.named_parameters() if weight.requires_grad}, OptimConfig(lr=1e-4)
        )
        seconds = []
        for _ in range(2 + 2 * rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for batch in batches:
                core.loss_packed(batch, dtype=torch.bfloat16).sum.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[2:])
        flops = sum(CoreFlops(core).batch(source.batch(number).batch) for number in range(len(batches)))
        rows[f"train {kind}"] = {
            "first_s": round(seconds[0], 1),
            "step_s": round(median, 3),
            "samples_per_s": round(len(Rows576.lengths()) / median, 2),
            "mfu": round(flops / median / peak_flops(CUDA, torch.bfloat16), 3),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }
        print(rows, file=sys.stderr, flush=True)
        del core, optimizers, batches
    return rows


class Rows576:
    """Sixteen samples with a picture each, and answers of drawn lengths."""

    def __init__(self, core: LlavaCore) -> None:
        self.grid, self.image = core.config.image_grid, core.config.image_token_index

    @staticmethod
    def lengths() -> list[int]:
        draw = random.Random(0)
        return [1 + 576 + 20 + draw.randint(24, 400) for _ in range(16)]

    def sample(self, index: int) -> Sample:
        length, draw = self.lengths()[index], random.Random(index)
        ids = (1, *[self.image or 0] * 576, *(draw.randrange(3, 32000) for _ in range(length - 577)))
        tiles = torch.rand(1, 3, 336, 336, generator=torch.Generator().manual_seed(index))
        return Sample(ids, (False,) * 597 + (True,) * (length - 597), tiles, (self.grid,))


def llava() -> LlavaCore:
    """Build the whole model in the CPU's memory, as loading does before weights are quantised."""
    vision = ClipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    config = LlavaConfig(text_config=text_config(), vision_config=vision, image_token_index=processor().image_token_id)
    with torch.device("meta"):
        core = LlavaCore(config)
    return filled(core, torch.device("cpu"))  # type: ignore[no-any-return]


def processor() -> LlavaProcessor:
    """Return the miniature's processor at CLIP-L's size."""
    small = LLM(MINIATURE, device="cpu").processor
    assert isinstance(small, LlavaProcessor)
    images = replace(small.image_processor, size_px=336, crop_px=336)
    return replace(small, image_processor=images, patch_size=14)


if __name__ == "__main__":
    sys.exit(main())
