"""llava serve beside llama.cpp's llama-server and transformers serve: the same random Llama, the same questions, in one run.

`python -m benchmarks.serving_peers --llama-server PATH` starts each server in turn (ours, theirs, ours, ...), lets 1, 8 and 64 clients ask
at once, and writes benchmarks/results/serving_peers.json: tokens per second over all clients, and seconds to the first token. transformers
(with what transformers[serving] brings) serves with continuous batching and without; llama-server with as many slots as clients and a cache
for all, in bfloat16 and in float16.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import write_result
from benchmarks.serving_process import SCRIPTS, ask, served
from llavakit import LlamaForCausalLM
from llavakit.checkpoint.convert import Conversion, convert
from llavakit.engine.llm import MINIATURE
from llavakit.model.config import LlamaConfig
from llavakit.processing.tokenizer.slow import LlamaTokenizer

NUM_TOKENS = {1: 64, 8: 32, 64: 16}
"""Tokens of each answer, by the number of clients."""
SHAPES = {
    "0.2B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
CONTEXT = 512
JINJA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def main() -> None:
    """Measure all servers that can be started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--servers", nargs="*", help="those whose names begin so; all when left out")
    options = parser.parse_args()
    shapes = {shape: compared(shape, options) for shape in options.shapes}
    facts = {"model": "random Llama, bfloat16", "tokens": NUM_TOKENS, "rounds": options.rounds, "shapes": shapes}
    write_result("serving_peers", "python -m benchmarks.serving_peers --llama-server PATH", facts)


def compared(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all servers with a model of one shape; medians of the rounds."""
    with tempfile.TemporaryDirectory() as place:
        folder = model_folder(Path(place) / "model", SHAPES[shape])
        servers = commands(folder, options.llama_server)
        if options.servers:
            servers = {name: command for name, command in servers.items() if name.startswith(tuple(options.servers))}
        rows: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in servers}
        for number in range(options.rounds):
            for name in sorted(servers, reverse=number % 2 == 1):
                for count, found in measured(servers[name], folder).items():
                    rows[name].setdefault(str(count), []).append(found)
                    print(shape, number, name, count, found, file=sys.stderr)
    return {
        name: {count: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for count, runs in by_count.items()}
        for name, by_count in rows.items()
    }


def model_folder(folder: Path, shape: Mapping[str, int]) -> Path:
    """Save a random Llama with the miniature's words, and the same as GGUF beside it."""
    tokenizer = LlamaTokenizer.from_pretrained(MINIATURE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **shape,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name, data in tokenizer.files().items():
        (folder / name).write_bytes(data)
    (folder / "chat_template.jinja").write_text(JINJA)
    convert(folder, folder.parent / "model.gguf", Conversion(to="gguf", gguf_type="bf16"))
    return folder


def commands(folder: Path, llama_server: Path | None) -> Mapping[str, Callable[[int], list[str]]]:
    """How each server is started on a port."""
    slots = max(NUM_TOKENS)
    found: dict[str, Callable[[int], list[str]]] = {
        "llava serve": lambda port: [
            *(str(SCRIPTS / "llava"), "serve", "--model", str(folder), "--name", str(folder), "--port", str(port)),
            *("--max-batch", str(slots), "--dtype", "bfloat16"),
        ],
        "transformers serve": lambda port: [str(SCRIPTS / "transformers"), "serve", "--port", str(port), "--host", "127.0.0.1"],
        "transformers serve, continuous batching": lambda port: [
            *(str(SCRIPTS / "transformers"), "serve", "--port", str(port), "--host", "127.0.0.1", "--continuous-batching"),
        ],
    }
    if llama_server is not None:
        gguf = str(next((folder.parent / "model.gguf").glob("*.gguf")))
        for kind in ("bf16", "f16"):
            found[f"llama-server, {kind} cache"] = functools.partial(_llama_command, llama_server, gguf, slots, kind)
    return found


def _llama_command(llama_server: Path, gguf: str, slots: int, kind: str, port: int) -> list[str]:
    return [
        *(str(llama_server), "--model", gguf, "--port", str(port), "--threads", str(torch.get_num_threads()), "--no-webui"),
        *("--parallel", str(slots), "--ctx-size", str(slots * CONTEXT), "--cache-type-k", kind, "--cache-type-v", kind),
    ]


def measured(command: Callable[[int], list[str]], folder: Path) -> dict[int, dict[str, float]]:
    """Start a server, warm it up, and let so many clients ask."""
    draw = random.Random(0)
    found = {}
    with served(command) as port:
        ask(port, [body(folder, draw, 16)])
        for count, num_tokens in NUM_TOKENS.items():
            report = ask(port, [body(folder, draw, num_tokens) for _ in range(count)])
            whole = [one for one in report["clients"] if one["first_s"] is not None]
            found[count] = {
                "answered": len(whole),
                "tokens_per_s": round(sum(one["pieces"] for one in whole) / report["seconds"], 2),
                "first_token_s": round(statistics.median(one["first_s"] for one in whole), 4) if whole else float("nan"),
            }
    return found


def body(folder: Path, draw: random.Random, num_tokens: int) -> dict[str, Any]:
    """One question, as all of them take it."""
    words = " ".join(draw.choice(("red", "blue", "circle", "square", "star")) for _ in range(40))
    messages = [{"role": "user", "content": words}]
    return {"model": str(folder), "messages": messages, "max_tokens": num_tokens, "temperature": 0, "stream": True}


if __name__ == "__main__":
    main()
