"""How fast prefill and decode are next to transformers: a random Llama of 1.1 thousand million parameters.

Ours is the engine as every command uses it; transformers runs forward passes over its own cache and takes the most likely token, without
generate's bookkeeping, once with its fused and once with its plain attention, and the faster one counts. Both sides have the same
weights. A round's decode is its median step, so that a neighbour's burst counts once.
Each row must reach a ratio of 0.97. Run: python -m benchmarks.forward [--device cuda] [--rounds 15]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers import LlamaConfig as HfLlamaConfig
from transformers import LlamaForCausalLM as HfLlama

from benchmarks.harness import alternate, write_result
from llavakit.engine.engine import Engine, EngineSettings
from llavakit.engine.request import Request, Terms
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore
from llavakit.model.surgery import fuse, init_weights
from llavakit.ops.pages import PAGE
from llavakit.processing.processor import Prompt
from llavakit.types import SamplingParams

CONTEXT = 2048
CASES = ((1, 512, 32), (8, 64, 16))  # rows, prompt tokens each, decode steps
DTYPES = (torch.float32, torch.bfloat16)
LEAST_RATIO = 0.97
NO_TILES = torch.empty(0, 3, 1, 1)


def main() -> int:
    """Measure all rows, record them; return 1 when one is below the least ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = []
    for dtype in DTYPES:
        core = random_core(dtype, options.device)
        peers = {f"transformers {kind}": twin_of(core, kind) for kind in ("sdpa", "eager")}
        if options.device == "cpu":
            fuse(core, dtype)
        for num_rows, num_tokens, steps in CASES:
            ids = torch.randint(3, 32000, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0))
            runs = {name: their_run(peer, ids.to(options.device), steps) for name, peer in peers.items()}
            parts = alternate(our_run(core, ids, steps), runs, options.rounds)
            case = {"dtype": str(dtype).removeprefix("torch."), "rows": num_rows, "prompt_tokens": num_tokens}
            for part, comparison in zip(("prefill", "decode"), parts, strict=True):
                rows.append({"part": part, **case, **comparison.to_row()})
                print(rows[-1], file=sys.stderr)
        del core, peers
    is_reached = all(row["ratio"] >= LEAST_RATIO for row in rows)
    values = {"least_ratio": LEAST_RATIO, "is_reached": is_reached, "decode_is": "seconds of the median step", "rows": rows}
    write_result(f"forward_{options.device}", f"python -m benchmarks.forward --device {options.device}", values)
    return 0 if is_reached else 1


def random_core(dtype: torch.dtype, device: str) -> LlamaCore:
    """Build a model of Llama-3.2-1B's shape with LLaVA's vocabulary."""
    config = LlamaConfig(
        vocab_size=32064,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
    )
    core = LlamaCore(config)
    init_weights(core, 0.02, torch.Generator().manual_seed(0))
    return core.to(device=device, dtype=dtype).eval()


def twin_of(core: LlamaCore, attention: str) -> HfLlama:
    """Build transformers' model around the same tensors."""
    with torch.device("meta"):
        twin = HfLlama._from_config(HfLlamaConfig(**core.config.to_dict()), attn_implementation=attention)
    twin.load_state_dict(core.state_dict(), assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config).to(next(core.parameters()).device)
    return twin.eval()


def our_run(core: LlamaCore, ids_BS: torch.Tensor, steps: int) -> Callable[[], Sequence[float]]:
    """Return a run that gives the seconds of the prefill and of one decode step."""
    params = SamplingParams(max_tokens=steps + 1, ignore_eos=True)
    num_rows, num_tokens = ids_BS.shape
    num_blocks = num_rows * -(-(num_tokens + steps + 1) // PAGE)
    engine = Engine(core, EngineSettings(num_blocks=num_blocks, max_batch=num_rows, step_tokens=num_rows * num_tokens, prefix_cache=False))

    def run() -> Sequence[float]:
        prompts = [Prompt(tuple(row), (False,) * len(row), NO_TILES) for row in ids_BS.tolist()]
        requests = [Request(prompt, params, Terms(context_len=CONTEXT, end_ids=frozenset())) for prompt in prompts]
        start = time.perf_counter()
        for request in requests:
            engine.add(request)
        times = [start]
        for _ in range(steps + 1):
            assert len(engine.step()) == num_rows
            times.append(time.perf_counter())
        assert not engine.has_work
        return _prefill_and_step(times)

    return run


def their_run(model: Any, ids_BS: torch.Tensor, steps: int) -> Callable[[], Sequence[float]]:
    """Return the same run through transformers; reading the tokens waits for the device, as our loop does."""

    @torch.inference_mode()
    def run() -> Sequence[float]:
        start = time.perf_counter()
        cache = DynamicCache(config=model.config)
        tokens = model(ids_BS, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()
        times = [start, time.perf_counter()]
        for _ in range(steps):
            tokens = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            tokens.tolist()
            times.append(time.perf_counter())
        return _prefill_and_step(times)

    return run


def _prefill_and_step(times: Sequence[float]) -> tuple[float, float]:
    """Return the seconds of the prefill and of the median decode step."""
    first, *rest = (later - earlier for earlier, later in itertools.pairwise(times))
    return first, statistics.median(rest)


if __name__ == "__main__":
    sys.exit(main())
