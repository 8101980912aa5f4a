"""What serving costs, and what it bears: a thousand clients, throughput beside the engine alone, microseconds of a request and a token.

`python -m benchmarks.serving` measures the parts on loopback, server, clients and the engine alone each in a process of its own, and writes
benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, write_result
from benchmarks.serving_peers import SHAPES, model_folder
from benchmarks.serving_process import SCRIPTS, ask, served, watched
from llavakit.engine.llm import LLM, MINIATURE
from llavakit.types import Conversation, SamplingParams
from tests.serving import Server, chat_body, data_url, picture

NUM_CLIENTS = 1000
LEAST = {"share of the engine's own throughput": 0.9}


def main() -> int:
    """Measure the parts asked for; return 1 when a figure is short."""
    parts: Mapping[str, Callable[[int], dict[str, Any]]] = {"load": load, "overhead": overhead, "throughput": throughput}
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--offline", type=Path, metavar="MODEL", help="answer tasks on stdin with the engine itself")
    options = parser.parse_args()
    if options.offline:
        answer_lines(options.offline)
        return 0
    path = RESULTS / "serving.json"
    rows: dict[str, Any] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    for name in options.parts:
        rows[name] = parts[name](options.rounds)
        print(name, json.dumps(rows[name], indent=1), file=sys.stderr)
    short = [key for key, least in LEAST.items() if rows.get("throughput", {}).get("share", 1.0) < least]
    write_result("serving", "python -m benchmarks.serving", {"least": LEAST, "short": short, "rows": rows})
    return 1 if short else 0


def llava(*options: str) -> Callable[[int], list[str]]:
    """Return how our server is started."""
    return lambda port: [str(SCRIPTS / "llava"), "serve", "--port", str(port), *options]


def load(rounds: int) -> dict[str, Any]:
    """A thousand clients at once on the miniature, half of them with a picture: with the default queue, and with one for all of them."""
    del rounds
    pictures = [data_url(picture(seed)) for seed in range(20)]
    bodies = [
        chat_body("How many things are there?", *([pictures[n % 20]] if n % 2 else []), stream=True, max_tokens=16, model="llava-miniature")
        for n in range(NUM_CLIENTS)
    ]
    found = {}
    for name, options in (("default queue", ()), ("queue for all", ("--max-waiting", str(NUM_CLIENTS), "--queue-s", "600"))):
        with served(llava(*options)) as port:
            ask(port, bodies[:8])
            with watched(port) as health:
                report = ask(port, bodies)
            counts = Server(port).counts()
            is_quiet = counts["llava_requests_running"] == counts["llava_requests_waiting"] == 0
        asked = report["clients"]
        whole = [one for one in asked if one["status"] == 200 and one["is_whole"]]
        refused = [one for one in asked if one["status"] in (429, 503)]
        health.sort()
        found[name] = {
            "clients": len(asked),
            "whole": len(whole),
            "refused": len(refused),
            "lost": len(asked) - len(whole) - len(refused),
            "seconds": round(report["seconds"], 2),
            "tokens_per_s": round(sum(one["pieces"] for one in whole) / report["seconds"]),
            "first_token_s": {"median": round(statistics.median(one["first_s"] for one in whole), 3)},
            "health_s": {"count": len(health), "p99": round(health[math.ceil(0.99 * len(health)) - 1], 3), "max": round(health[-1], 3)},
            "is_quiet": is_quiet,
        }
    return found


def overhead(rounds: int) -> dict[str, Any]:
    """One client on the miniature: microseconds that a request and a token take longer than from the engine itself."""
    lengths, repeats = (1, 129), 10
    rows: dict[int, list[float]] = {length: [] for length in lengths}
    options = ("--max-batch", "8", "--kv-memory", str(64 << 20))
    with offline(MINIATURE) as alone, served(llava(*options)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(rounds * repeats):
            for length in lengths:
                for _ in range(2):  # the first of each wakes up what slept through the runs of the other length
                    # Other words each time: the cache finds nothing but the beginning, on either side.
                    words = f"How many things are there? {random.random()}"
                    body = chat_body(words, max_tokens=length, stream=True, logit_bias={"2": -100}, model="llava-miniature")
                    engine = alone([words], length)
                    began = time.perf_counter()
                    send(connection, body)
                    more = time.perf_counter() - began - engine
                rows[length].append(more)
    one, many = (statistics.median(rows[length]) for length in lengths)
    per_token = (many - one) / (lengths[1] - lengths[0])
    return {"us_per_request": round(1e6 * (one - per_token)), "us_per_token": round(1e6 * per_token), "runs": rounds * repeats}


def send(connection: http.client.HTTPConnection, body: Any) -> None:
    """Ask on a kept connection, and read the stream to its end."""
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")


def throughput(rounds: int) -> dict[str, Any]:
    """Eight streams on the 1B shape beside the same requests given to the engine itself, in turn."""
    draw, num_tokens = random.Random(0), 48
    alone_s, served_s, ratios = [], [], []
    with tempfile.TemporaryDirectory() as place:
        folder = model_folder(Path(place) / "model", SHAPES["1B"])
        options = ("--model", str(folder), "--name", "1B", "--dtype", "bfloat16", "--max-batch", "8", "--kv-memory", str(1 << 30))
        with offline(folder) as alone, served(llava(*options)) as port:
            for number in range(rounds + 1):
                texts = [" ".join(draw.choice(("red", "blue", "circle", "square", "star")) for _ in range(40)) for _ in range(8)]
                bodies = [chat_body(text, max_tokens=num_tokens, logit_bias={"2": -100}, stream=True, model="1B") for text in texts]
                engine = alone(texts, num_tokens)
                report = ask(port, bodies)
                assert all(one["is_whole"] for one in report["clients"])
                if number:
                    alone_s.append(engine)
                    served_s.append(report["seconds"])
                    ratios.append(engine / report["seconds"])
    return {
        "streams": 8,
        "tokens": num_tokens,
        "engine_s": round(statistics.median(alone_s), 3),
        "served_s": round(statistics.median(served_s), 3),
        "share": round(statistics.median(ratios), 3),
        "shares": [round(ratio, 3) for ratio in sorted(ratios)],
    }


@contextlib.contextmanager
def offline(folder: Path) -> Iterator[Callable[[Sequence[str], int], float]]:
    """Give a function that answers questions with the engine itself, in a process of its own: the seconds that takes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", "--offline", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(texts: Sequence[str], num_tokens: int) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([list(texts), num_tokens]) + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    try:
        yield run
    finally:
        process.terminate()
        process.wait(60)


def answer_lines(folder: Path) -> None:
    """Be that process: a task a line on stdin, seconds a line on stdout."""
    llm = LLM(str(folder), device="cpu", max_batch=8, kv_memory=1 << 28)
    for line in sys.stdin:
        texts, num_tokens = json.loads(line)
        params = SamplingParams(max_tokens=num_tokens, logit_bias={2: -100})
        began = time.perf_counter()
        llm.chat([Conversation.ask(text) for text in texts], params)
        sys.stdout.write(f"{time.perf_counter() - began}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
