"""Bad clients beside a good one, for so many seconds.

Owns: abuse, its Counts and its ACTS, and memory_of. Each bad client draws what it does from its own seed; the good one asks what it knows
the answer to.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.serving import Server, chat_body, data_url, picture
from tests.soak.mutants import mutant

__all__ = ["ACTS", "Counts", "abuse", "memory_of", "mutated"]

_NUM_BAD = 6
_QUESTION = "How many things are there?"


@dataclass
class Counts:
    """What happened."""

    statuses: Counter[int] = field(default_factory=Counter)
    """Of bad requests that got an answer."""
    acts: Counter[str] = field(default_factory=Counter)
    good: int = 0
    """Right answers to the good client."""
    busy: int = 0
    """Refusals of the good client because there was too much to do."""
    wrong: list[str] = field(default_factory=list)
    """Whatever else it got."""
    slowest_s: float = 0.0
    rss_bytes: list[int] = field(default_factory=list)
    """Memory of the server's process, now and then."""


def abuse(server: Server, seconds: float, *, seed: int = 0, process: int | None = None) -> Counts:
    """Let bad clients loose for so many seconds, and ask good questions meanwhile; process is the server's, where it has its own."""
    counts, guard = Counts(), threading.Lock()
    until = time.monotonic() + seconds
    expected = server.chat(chat_body(_QUESTION, data_url(picture()))).json()["choices"]

    def bad(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        while time.monotonic() < until:
            act = rng.choice(ACTS)
            status = act(server, rng)
            with guard:
                counts.acts[act.__name__] += 1
                if status is not None:
                    counts.statuses[status] += 1

    threads = [threading.Thread(target=bad, args=(number,)) for number in range(_NUM_BAD)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        began = time.monotonic()
        reply = server.chat(chat_body(_QUESTION, data_url(picture())))
        counts.slowest_s = max(counts.slowest_s, time.monotonic() - began)
        if reply.status == 200 and reply.json()["choices"] == expected:
            counts.good += 1
        elif reply.status == 503:
            counts.busy += 1
        else:
            counts.wrong.append(reply.body.decode(errors="replace")[:300])
        counts.rss_bytes.append(memory_of(os.getpid() if process is None else process))
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)
    return counts


def mutated(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value."""
    odd: tuple[Any, ...] = (
        None,
        True,
        -1,
        10**30,
        1.5,
        "",
        "x" * 10_000,
        "\0\ud800",
        [],
        {},
        [[[[]]]],
        {"a": 1},
        "<image></s>",
        float("nan"),
    )
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {**value, rng.choice(("extra", key.upper(), "")): rng.choice(odd)}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(value[place], rng), *value[place + 1 :]]
    return rng.choice(odd)


def _mutated_body(server: Server, rng: random.Random) -> int:
    body: Any = chat_body("What?", data_url(picture(rng.randrange(5))), stop=["x"], seed=1, n=1, max_tokens=4)
    for _ in range(rng.randrange(1, 4)):
        body = mutated(body, rng)
    return server.ask("POST", rng.choice(("/v1/chat/completions", "/v1/tokenize", "/v1/score")), body).status


def _damaged_bytes(server: Server, rng: random.Random) -> int:
    data = bytearray(json.dumps(chat_body("What?", max_tokens=2)).encode())
    for _ in range(rng.randrange(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return server.chat(bytes(data)).status


def _damaged_picture(server: Server, rng: random.Random) -> int:
    return server.chat(chat_body("What?", data_url(mutant(rng.randrange(1 << 30))), max_tokens=2)).status


def _goes_away(server: Server, rng: random.Random) -> None:
    with contextlib.suppress(OSError), server.connect() as plain:
        body = json.dumps(chat_body("What?", data_url(picture(rng.randrange(5))), stream=True, max_tokens=100)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        plain.sendall((head % len(body) + body)[: rng.randrange(1, 2 * len(body))])
        time.sleep(rng.random() * 0.1)
        if rng.random() < 0.5:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _half_closes(server: Server, rng: random.Random) -> None:
    with contextlib.suppress(OSError), server.connect(receive_bytes=1024) as plain:
        plain.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n{" % rng.randrange(100))
        plain.shutdown(socket.SHUT_WR)
        plain.settimeout(0.5)
        plain.recv(100)


def _no_http(server: Server, rng: random.Random) -> None:
    with contextlib.suppress(OSError), server.connect() as plain:
        plain.sendall(rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n")
        plain.settimeout(0.5)
        plain.recv(100)


def _other_paths(server: Server, rng: random.Random) -> int:
    with contextlib.suppress(http.client.HTTPException, OSError):
        path = "/" + "".join(rng.choice("/.%2ev1chat?#\\") for _ in range(rng.randrange(30)))
        return server.ask(rng.choice(("GET", "PUT", "POST", "HEAD")), path).status
    return 400


ACTS = (_mutated_body, _mutated_body, _damaged_bytes, _damaged_picture, _goes_away, _half_closes, _no_http, _other_paths)


def memory_of(process: int) -> int:
    """Return the bytes of memory that a process has."""
    with open(f"/proc/{process}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
