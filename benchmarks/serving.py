"""What serving costs, and what it bears: a thousand clients, throughput beside the engine alone, microseconds of a request and a token.

`python -m benchmarks.serving` measures the parts on loopback, the clients in a process of their own, and writes
benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.forward import random_core
from benchmarks.harness import RESULTS, write_result
from llavakit.engine.llm import LLM
from llavakit.model.surgery import fuse
from llavakit.processing.text import TextProcessor
from llavakit.server.config import ServerConfig
from llavakit.types import Conversation, SamplingParams
from tests.serving import Running, chat_body, data_url, miniature, picture, running

NUM_CLIENTS = 1000
LEAST = {"share of the engine's own throughput": 0.9}


def main() -> int:
    """Measure the parts asked for; return 1 when a figure is short."""
    parts: Mapping[str, Callable[[int], dict[str, Any]]] = {"load": load, "overhead": overhead, "throughput": throughput}
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    path = RESULTS / "serving.json"
    rows: dict[str, Any] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    for name in options.parts:
        rows[name] = parts[name](options.rounds)
        print(name, json.dumps(rows[name], indent=1), file=sys.stderr)
    short = [key for key, least in LEAST.items() if rows.get("throughput", {}).get("share", 1.0) < least]
    write_result("serving", "python -m benchmarks.serving", {"least": LEAST, "short": short, "rows": rows})
    return 1 if short else 0


def clients(server: Running, bodies: Sequence[Any], *, health: bool = False) -> dict[str, Any]:
    """Let so many clients ask at once, in a process of their own."""
    task = json.dumps({"port": server.port, "bodies": bodies, "health": health})
    done = subprocess.run([sys.executable, "-m", "benchmarks.serving_clients"], input=task, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def load(rounds: int) -> dict[str, Any]:
    """A thousand clients at once on the miniature, half of them with a picture: with the default queue, and with one for all of them."""
    del rounds
    pictures = [data_url(picture(seed)) for seed in range(20)]
    bodies = [
        chat_body("How many things are there?", *([pictures[n % 20]] if n % 2 else []), stream=True, max_tokens=16)
        for n in range(NUM_CLIENTS)
    ]
    found = {}
    for name, config in (
        ("default queue", ServerConfig(port=0)),
        ("queue for all", ServerConfig(port=0, max_waiting=NUM_CLIENTS, queue_s=600.0)),
    ):
        with running(config, llm=LLM.of(miniature().core, miniature().processor, max_batch=32, kv_memory=256 << 20)) as server:
            report = clients(server, bodies, health=True)
            is_quiet = server.is_quiet()
        asked, health = report["clients"], sorted(report["health"])
        whole = [one for one in asked if one["status"] == 200 and one["is_whole"]]
        refused = [one for one in asked if one["status"] in (429, 503)]
        found[name] = {
            "clients": len(asked),
            "whole": len(whole),
            "refused": len(refused),
            "lost": len(asked) - len(whole) - len(refused),
            "seconds": round(report["seconds"], 2),
            "tokens_per_s": round(sum(one["pieces"] for one in whole) / report["seconds"]),
            "first_token_s": {"median": round(statistics.median(one["first_s"] for one in whole), 3)},
            "health_s": {"count": len(health), "p99": round(health[int(0.99 * (len(health) - 1))], 3), "max": round(health[-1], 3)},
            "is_quiet": is_quiet,
        }
    return found


def overhead(rounds: int) -> dict[str, Any]:
    """One client on the miniature: microseconds that a request and a token take longer than from the engine itself."""
    counts, repeats = (1, 129), 10
    llm = LLM.of(miniature().core, miniature().processor, max_batch=8, kv_memory=64 << 20, prefix_cache=False)
    question = Conversation.ask("How many things are there?")
    rows: dict[int, list[float]] = {count: [] for count in counts}
    with running(llm=LLM.of(miniature().core, miniature().processor, max_batch=8, kv_memory=64 << 20, prefix_cache=False)) as server:
        for _ in range(rounds * repeats):
            for count in counts:
                body = chat_body(max_tokens=count, stream=True, logit_bias={"2": -100})
                params = SamplingParams(max_tokens=count, logit_bias={2: -100})
                began = time.perf_counter()
                for _event in llm.stream(question, params):
                    pass
                middle = time.perf_counter()
                server.chat(body)
                rows[count].append(time.perf_counter() - middle - (middle - began))
    one, many = (statistics.median(rows[count]) for count in counts)
    per_token = (many - one) / (counts[1] - counts[0])
    return {"us_per_request": round(1e6 * (one - per_token)), "us_per_token": round(1e6 * per_token), "runs": rounds * repeats}


def throughput(rounds: int) -> dict[str, Any]:
    """Eight streams on the 1B shape beside the same requests given to the engine itself, in turn."""
    core = random_core(torch.bfloat16, "cpu")
    fuse(core, torch.bfloat16)
    words = miniature().processor.tokenizer
    processor = TextProcessor(tokenizer=words, template=miniature().processor.template)
    draw = random.Random(0)
    num_tokens, texts = 48, [" ".join(draw.choice(("red", "blue", "circle", "square", "star")) for _ in range(40)) for _ in range(8)]

    def fresh() -> LLM:
        return LLM.of(core, processor, max_batch=8, kv_memory=1 << 30, prefix_cache=False)

    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    biased = {"max_tokens": num_tokens, "logit_bias": {"2": -100}, "stream": True}
    ratios = []
    offline, served = [], []
    with running(llm=fresh()) as server:
        own = fresh()
        for number in range(rounds + 1):
            began = time.perf_counter()
            own.chat([Conversation.ask(text) for text in texts], params)
            alone = time.perf_counter() - began
            report = clients(server, [chat_body(text, **biased) for text in texts])
            assert all(one["is_whole"] for one in report["clients"])
            if number:
                offline.append(alone)
                served.append(report["seconds"])
                ratios.append(alone / report["seconds"])
    return {
        "streams": 8,
        "tokens": num_tokens,
        "engine_s": round(statistics.median(offline), 3),
        "served_s": round(statistics.median(served), 3),
        "share": round(statistics.median(ratios), 3),
        "shares": [round(ratio, 3) for ratio in sorted(ratios)],
    }


if __name__ == "__main__":
    sys.exit(main())
