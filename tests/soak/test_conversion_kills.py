"""Conversions killed with SIGKILL at random moments: the destination is what it was, or complete; 5 always, 100 in the soak."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.harness import write_result
from llavakit.checkpoint.verify import Comparison, verify
from llavakit.model.config import LlamaConfig
from llavakit.model.llava_config import LlavaConfig
from llavakit.pretrained.causal_lm import LlavaLlamaForCausalLM
from llavakit.storage.folder import manifest_problems
from tests.tiny import llava_config, scale_weights, tiny_processor

# One process that has converted before, and so imported everything, forks each conversion: a kill may fall on any part of it.
NURSERY = """
import os, sys
from pathlib import Path
from llavakit.checkpoint.convert import Conversion, convert
convert(Path(sys.argv[1]), Path(sys.argv[2]))
for line in sys.stdin:
    to, destination = line.rstrip("\\n").split(" ", 1)
    child = os.fork()
    if child == 0:
        how = Conversion(to=to, gguf_type="f32" if to == "gguf" else None, max_shard_bytes=4_000_000)
        convert(Path(sys.argv[1]), Path(destination), how)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
OUTPUTS = ("hf", "original", "text", "gguf")


@dataclass
class Nursery:
    """Conversions of one checkpoint, each in a process of its own."""

    source: Path
    process: "subprocess.Popen[str]"

    def convert(self, to: str, destination: Path, kill_after_s: float | None = None) -> bool:
        """Convert, or kill the conversion after a while; returns whether it ended by itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{to} {destination}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline()) == 0


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    text = LlamaConfig(
        **{**llava_config().text_config.to_dict(), "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64}
    )
    config = LlavaConfig.from_dict({**llava_config().to_dict(), "text_config": text.to_dict()})
    folder = tmp_path_factory.mktemp("kills")
    source = folder / "source"
    scale_weights(LlavaLlamaForCausalLM(config)).save_pretrained(source, processor=tiny_processor())
    command = [sys.executable, "-c", NURSERY, str(source), str(folder / "first")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield Nursery(source, process)
        assert process.stdin is not None
        process.stdin.close()


def kill_many(nursery: Nursery, folder: Path, num_kills: int) -> Counter[str]:
    """Kill so many conversions, and look at the destination after each; returns how often it was what."""
    chance, found = random.Random(num_kills), Counter[str]()
    lengths = {}
    for to in OUTPUTS:
        began = time.monotonic()
        assert nursery.convert(to, folder / "whole")
        lengths[to] = time.monotonic() - began
        shutil.rmtree(folder / "whole")
    for number in range(num_kills):
        to, destination = OUTPUTS[number % len(OUTPUTS)], folder / "new"
        is_empty_before = chance.random() < 0.5
        if is_empty_before:
            destination.mkdir()
        nursery.convert(to, destination, chance.uniform(0, 1.1 * lengths[to]))
        if destination.is_dir() and any(destination.iterdir()):
            assert manifest_problems(destination, check_hashes=True) == []
            assert verify(nursery.source, destination, Comparison(runs_models=number < len(OUTPUTS))).is_same
            found["complete"] += 1
        else:
            assert destination.is_dir() == is_empty_before
            found["as before"] += 1
            found["with leftovers"] += len(list(folder.iterdir())) > is_empty_before
            assert nursery.convert(to, destination)  # which clears up what the dead one left
            assert manifest_problems(destination, check_hashes=True) == []
        assert [path.name for path in folder.iterdir()] == ["new"]
        shutil.rmtree(destination)
    return found


def test_a_killed_conversion_leaves_no_half(nursery: Nursery, tmp_path: Path) -> None:
    found = kill_many(nursery, tmp_path, 5)
    assert found["as before"] + found["complete"] == 5


@pytest.mark.soak
def test_a_hundred_killed_conversions(nursery: Nursery, tmp_path: Path) -> None:
    found = kill_many(nursery, tmp_path, 100)
    write_result("conversion_kills", "make soak", {"kills": 100, **found})
    assert found["as before"] > 50
    assert found["with leftovers"] > 10
