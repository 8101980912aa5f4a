"""The server, longer than the tests take: a thousand clients go away at random moments; it is killed under load and starts again."""

import http.client
import io
import json
import multiprocessing
import random
import signal
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from PIL import Image

from benchmarks.harness import write_result
from llavakit.server.config import ServerConfig
from tests.serving import Running, Server, chat_body, data_url, picture, running
from tests.serving_abuse import memory_of
from tests.unit.server.test_load import LONG, ended, port_of, request_bytes, serve

pytestmark = pytest.mark.soak
NUM_CANCELS = 1000
NUM_KILLS = 10
NAMED = {**chat_body(), "model": "llava-miniature"}


def go_away(server: Running, number: int) -> bool:
    """Send all or a part of a request, leave after a moment, by reset or politely; say whether an answer had begun."""
    draw = random.Random(number)
    asked = request_bytes(
        chat_body("What?", data_url(picture(draw.randrange(5))), **{**LONG, "stream": draw.random() < 0.5, "n": draw.randint(1, 3)})
    )
    with server.connect() as plain:
        plain.sendall(asked if draw.random() < 0.8 else asked[: draw.randrange(len(asked))])
        time.sleep(draw.choice((0.0, 0.05, 0.5, 3.0)) * draw.random())
        plain.setblocking(False)
        try:
            begun = bool(plain.recv(1 << 12))
        except BlockingIOError:
            begun = False
        if draw.random() < 0.5:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return begun


def test_a_thousand_cancels_leave_nothing() -> None:
    with running(ServerConfig(port=0)) as server:
        first = server.chat(chat_body()).json()["choices"]
        with ThreadPoolExecutor(8) as pool:
            begun = list(pool.map(lambda number: go_away(server, number), range(NUM_CANCELS)))
        assert server.is_quiet()
        assert server.chat(chat_body()).json()["choices"] == first
        assert any(begun)
        assert not all(begun)
        write_result("serving_cancels", "make soak", {"cancels": NUM_CANCELS, "answers_begun": sum(begun)})


def flooded(port: int, body: bytes, num_clients: int) -> list[int]:
    """Ask twice with each of so many clients at once; returns what they heard."""
    with ThreadPoolExecutor(num_clients) as pool:
        return list(pool.map(lambda _: Server(port).chat(body).status, range(2 * num_clients)))


def test_floods_of_long_bodies_take_so_much_memory_and_give_it_back() -> None:
    noise = io.BytesIO()
    Image.effect_noise((2000, 2000), 90).save(noise, "JPEG", quality=80)
    photographs = chat_body("What?", *[data_url(noise.getvalue(), "image/jpeg")] * 8)
    floods = {
        "31 MB of nothing": ({**NAMED, "junk": "x" * (31 << 20)}, 40, {400, 503}),
        "8 pictures of 4 megapixels": ({**photographs, "model": NAMED["model"]}, 24, {200, 503}),
    }
    process = serve("--kv-memory", str(64 << 20))
    try:
        server, rows = Server(port_of(process)), {}
        assert server.chat({**chat_body("What?", data_url(picture())), "model": NAMED["model"]}).status == 200
        before = memory_of(process.pid)
        for name, (body, num_clients, expected) in floods.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
                heard = apart.submit(flooded, server.port, json.dumps(body).encode(), num_clients)
                memory, health_s = [before], list[float]()
                while not heard.done():
                    began = time.monotonic()
                    assert server.ask("GET", "/health").status == 200
                    health_s.append(time.monotonic() - began)
                    memory.append(memory_of(process.pid))
                    time.sleep(0.02)
            assert set(heard.result()) <= expected
            after = memory_of(process.pid)
            sizes = {"before": before, "most": max(memory), "after": after}
            rows[name] = {
                "clients": num_clients,
                "answers": dict(Counter(heard.result())),
                "health_max_s": round(max(health_s), 2),
                "rss_mb": {key: round(value / 1e6) for key, value in sizes.items()},
            }
            assert max(memory) - before < 3 * ServerConfig().max_held_bytes
            assert after - before < 128 << 20
        assert ended(process, signal.SIGTERM) == 0
    finally:
        process.kill()
    write_result("serving_floods", "make soak", rows)


def first_answer(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(NAMED), {"Content-Type": "application/json"})
    answer: str = json.load(connection.getresponse())["choices"][0]["message"]["content"]
    connection.close()
    return answer


def test_killed_under_load_it_starts_again_as_fast() -> None:
    answers, seconds = [], []
    for number in range(NUM_KILLS):
        began = time.monotonic()
        process = serve()
        port = port_of(process)
        answers.append(first_answer(port))
        seconds.append(time.monotonic() - began)
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
        for plain in clients:
            plain.sendall(request_bytes({**NAMED, **LONG, "stream": True}))
        assert clients[0].recv(1 << 12).startswith(b"HTTP/1.1 200")
        time.sleep(random.Random(number).random())
        assert ended(process, signal.SIGKILL) == -signal.SIGKILL
        for plain in clients:
            plain.close()
    assert len(set(answers)) == 1
    assert max(seconds[1:]) < 2 * seconds[0]  # the rest is the machine's noise
    write_result("serving_restarts", "make soak", {"kills": NUM_KILLS, "seconds_to_first_answer": [round(value, 2) for value in seconds]})
