"""Too many, too slow, gone, and broken: whoever asks gets an answer or an error, and nothing is left behind. Section E, A23, A24, G5."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from PIL import Image

from llavakit.engine.llm import LLM
from llavakit.server.config import ServerConfig
from llavakit.server.room import Room
from tests.serving import Reply, Running, chat_body, data_url, miniature, picture, running
from tests.unit.server.test_requests import png

LONG: dict[str, Any] = {"max_tokens": 700, "logit_bias": {"2": -100}, "temperature": 1.0, "seed": 1}
KEYS = ("sk-first", "sk-second")


def request_bytes(body: dict[str, Any], headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
    data = json.dumps(body).encode()
    fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(data), "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + data


def started(server: Running, headers: Mapping[str, str] = MappingProxyType({}), **fields: Any) -> socket.socket:
    """Begin a long streamed answer and wait for its first bytes."""
    plain = server.connect()
    plain.sendall(request_bytes(chat_body(**{**LONG, "stream": True, **fields}), headers))
    assert plain.recv(1 << 12).startswith(b"HTTP/1.1 200")
    return plain


def rest(plain: socket.socket) -> bytes:
    """Read to the end and close."""
    with plain:
        return b"".join(iter(lambda: plain.recv(1 << 16), b""))


def in_thread(call: Callable[[], Reply]) -> tuple[threading.Thread, list[Reply]]:
    found: list[Reply] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def waited(check: Callable[[], bool], limit_s: float = 10) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.catalogue("E1", "E27")
def test_each_of_many_gets_a_whole_answer_or_a_503() -> None:
    with running(ServerConfig(port=0, max_waiting=20)) as server:
        with ThreadPoolExecutor(64) as pool:
            urls = [data_url(picture(n % 3)) if n % 2 else None for n in range(150)]
            replies = list(pool.map(lambda url: server.chat(chat_body("What?", *([url] if url else []), stream=True, max_tokens=10)), urls))
        kinds = {reply.status for reply in replies}
        assert kinds <= {200, 503}
        for reply in replies:
            if reply.status == 200:
                assert reply.events()[-1] is None
            else:
                assert 1 <= int(reply.headers["retry-after"]) <= 5
        assert server.is_quiet()


@pytest.mark.catalogue("E2")
def test_a_full_server_says_so_before_it_reads_anything() -> None:
    with running(ServerConfig(port=0, max_waiting=0)) as server:
        busy = [started(server, seed=n) for n in range(8)]
        began = time.perf_counter()
        reply = server.raw(request_bytes(chat_body())[:200] + b"x" * 100)
        assert reply.startswith(b"HTTP/1.1 503")
        assert b"connection: close" in reply.lower()
        assert time.perf_counter() - began < 1
        assert server.chat(json.dumps(chat_body()).encode() + b" " * (30 << 20)).status == 503  # also where it is still sending
        assert server.ask("GET", "/health").status == 200
        assert server.ask("GET", "/ready").status == 503
        for plain in busy:
            plain.close()
        assert server.is_quiet()
        assert server.chat(chat_body()).status == 200


@pytest.mark.catalogue("E24", "C3")
def test_bodies_take_so_much_memory_together() -> None:
    config = ServerConfig(port=0, max_body_bytes=1 << 20, max_images_bytes=1 << 20, max_held_bytes=(2 << 20) - 4096)
    with running(config) as server:
        body = json.dumps(chat_body()).encode()
        big = b'{"model": "%s"' % (b"x" * (1 << 20))
        halves = [server.connect() for _ in range(2)]
        for plain in halves:
            plain.sendall(request_bytes({})[:-2].replace(b"Content-Length: 2", b"Content-Length: %d" % (1 << 20)) + big[: 3 << 18])
        assert waited(lambda: server.app.gate.num_bytes == 2 * (3 << 18))
        reply = server.chat(body + b" " * (600 << 10))
        assert (reply.status, reply.code, reply.headers["connection"]) == (503, "overloaded", "close")
        assert 1 <= int(reply.headers["retry-after"]) <= 5
        assert server.chat(body).status == 200
        for plain in halves:
            plain.close()
        assert server.is_quiet()
        assert server.chat(body + b" " * (600 << 10)).status == 200


@pytest.mark.catalogue("E24")
def test_decoded_pictures_take_so_much_memory_together() -> None:
    config = ServerConfig(port=0, max_images_pixels=2 * 64 * 64, max_held_pixels=3 * 64 * 64)
    with running(config) as server, ThreadPoolExecutor(12) as pool:
        used, room, images = [0], server.app.service.room, server.app.service.decoders.images

        async def counted(pictures: Sequence[bytes]) -> list[Image.Image]:
            used.append(room.used)
            return await images(pictures)

        server.app.service.decoders.images = counted  # type: ignore[method-assign]
        bodies = [chat_body("What?", *(data_url(picture(place)) for place in range(1 + n % 2)), max_tokens=2) for n in range(12)]
        assert {reply.status for reply in pool.map(server.chat, bodies)} == {200}
        assert 64 * 64 < max(used) <= config.max_held_pixels
        assert server.is_quiet()


def test_who_waits_for_room_gets_it_in_turn_and_may_stop_waiting() -> None:
    async def found() -> list[str]:
        room, order = Room(10), list[str]()

        async def enter(name: str, amount: int) -> None:
            async with room.of(amount):
                order.append(name)
                await asyncio.sleep(0.01)

        async with room.of(8):
            tasks = [asyncio.ensure_future(enter(name, amount)) for name, amount in (("a", 3), ("b", 9), ("c", 1), ("d", 0), ("e", 2))]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert (order, room.used) == (["d"], 8)  # the others wait behind the first; nothing needs no room
            tasks[1].cancel()
        tasks[4].cancel()  # its turn has come at this very moment
        await asyncio.gather(*tasks, return_exceptions=True)
        assert room.used == 0
        return order

    assert asyncio.run(found()) == ["d", "a", "c"]


@pytest.mark.catalogue("E3")
def test_who_waits_too_long_is_told() -> None:
    llm = LLM.of(miniature().core, miniature().processor, max_batch=1, kv_memory=64 << 20)
    with running(ServerConfig(port=0, queue_s=0.3), llm=llm) as server, started(server):
        assert server.chat(chat_body()).code == "queue_timeout"
        assert server.chat(chat_body(stream=True)).code == "queue_timeout"


@pytest.mark.catalogue("E4", "E26")
def test_who_takes_too_long_is_ended() -> None:
    with running(ServerConfig(port=0, request_s=0.3)) as server:
        assert (server.chat(chat_body(**LONG)).status, server.chat(chat_body(**LONG)).code) == (504, "request_timeout")
        events = server.chat(chat_body(**LONG, stream=True)).events()
        assert events[-1]["error"]["code"] == "request_timeout"
        assert None not in events
        assert server.is_quiet()


@pytest.mark.catalogue("E5", "E6", "G6")
def test_who_goes_away_leaves_nothing(server: Running) -> None:
    first = server.chat(chat_body()).json()["choices"]
    for moment in range(40):
        plain = server.connect()
        plain.sendall(
            request_bytes(chat_body("What?", data_url(picture(moment % 3)), **{**LONG, "stream": moment % 2 == 0}))[
                : None if moment % 5 else 600
            ]
        )
        time.sleep(0.002 * moment)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", moment % 3 > 0, 0))
        plain.close()
    assert server.is_quiet()
    assert server.chat(chat_body()).json()["choices"] == first


@pytest.mark.catalogue("E7")
def test_who_does_not_read_is_left() -> None:
    with running(ServerConfig(port=0, write_s=0.5)) as server:
        plain = server.connect(receive_bytes=1024)
        plain.sendall(request_bytes(chat_body(**LONG, stream=True, logprobs=True, top_logprobs=20, n=8)))
        assert waited(lambda: server.app.gate.num_inside == 1)
        assert server.is_quiet()
        assert server.chat(chat_body()).status == 200
        plain.close()


@pytest.mark.catalogue("E8")
def test_who_sends_slowly_is_left() -> None:
    with running(ServerConfig(port=0, header_s=0.4, body_s=0.4)) as server:
        for begin in (b"", b"POST /v1/chat", request_bytes(chat_body())[:100]):
            with server.connect() as plain:
                began = time.monotonic()
                for letter in begin:
                    plain.sendall(bytes([letter]))
                assert plain.recv(1 << 12) == b""
                assert time.monotonic() - began < 3
        with server.connect() as plain:
            plain.sendall(request_bytes(chat_body())[:-5])
            assert plain.recv(1 << 12).startswith(b"HTTP/1.1 408")
        assert server.is_quiet()


@pytest.mark.catalogue("E9", "E5")
def test_half_closed_and_idle_connections_end() -> None:
    with running(ServerConfig(port=0, keep_alive_s=1.0, header_s=1.0)) as server:
        with server.connect() as plain:
            plain.sendall(request_bytes(chat_body(**LONG, stream=True)))
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(1 << 16):
                pass
        with server.connect() as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            data = plain.recv(1 << 12)
            assert data.startswith(b"HTTP/1.1 200")
            while plain.recv(1 << 12):
                pass
        assert server.is_quiet()


@pytest.mark.catalogue("E14", "E26")
def test_an_engine_that_breaks_is_told_to_everybody() -> None:
    with running() as server:
        plain = started(server)
        thread, found = in_thread(lambda: server.chat(chat_body(**LONG)))
        assert waited(lambda: server.engine.stats().num_running == 2)

        def broken() -> Any:
            raise AssertionError("a block is lost at 0x7fffdeadbeef")

        server.engine.llm.engine.step = broken  # type: ignore[method-assign]
        data = rest(plain)
        thread.join(10)
        assert b'"error"' in data
        assert b"[DONE]" not in data
        assert b"0x7f" not in data
        assert found[0].status >= 500
        assert server.ask("GET", "/health").status == 503
        assert server.chat(chat_body()).status == 503


@pytest.mark.catalogue("E15")
def test_an_engine_that_hangs_is_unhealthy() -> None:
    with running(ServerConfig(port=0, stall_s=0.3)) as server:
        held = threading.Event()
        step = server.engine.llm.engine.step
        server.engine.llm.engine.step = lambda: (held.wait(20), step())[1]  # type: ignore[method-assign]
        thread, _ = in_thread(lambda: server.chat(chat_body()))
        assert waited(lambda: server.engine.stats().num_waiting == 1)
        assert waited(lambda: server.ask("GET", "/health").status == 503)
        held.set()
        thread.join(10)
        assert waited(lambda: server.ask("GET", "/health").status == 200)


@pytest.mark.catalogue("A23", "E18")
def test_a_decoder_that_dies_is_the_pictures_fault() -> None:
    with running(ServerConfig(port=0, num_decoders=1)) as server:
        assert server.chat(chat_body("What?", data_url(picture(1)))).status == 200
        (pid,) = server.app.service.decoders.pids()
        os.kill(pid, signal.SIGSTOP)
        thread, found = in_thread(lambda: server.chat(chat_body("What?", data_url(picture(2)))))
        assert waited(lambda: server.app.gate.num_inside == 1)
        assert server.chat(chat_body()).status == 200  # a text does not wait for pictures
        os.kill(pid, signal.SIGKILL)
        thread.join(20)
        assert (found[0].status, found[0].code) == (400, "invalid_image")
        assert server.chat(chat_body("What?", data_url(picture(2)))).status == 200


@pytest.mark.catalogue("E25")
def test_a_decoder_that_cannot_start_is_no_pictures_fault() -> None:
    with running(ServerConfig(port=0, num_decoders=1)) as server:
        decoders = server.app.service.decoders
        command = decoders._command
        for broken in ("/nowhere", "/bin/true"):
            decoders._command = (broken, *command[1:])
            reply = server.chat(chat_body("What?", data_url(picture(1))))
            assert (reply.status, reply.code) == (503, "overloaded")
        decoders._command = command
        assert server.chat(chat_body("What?", data_url(picture(1)))).status == 200


@pytest.mark.catalogue("A23", "A24", "A15", "A20")
def test_decoding_has_limits_of_time_and_memory() -> None:
    with running(ServerConfig(port=0, decode_s=0.05, num_decoders=1)) as server:
        server.call(lambda: server.app.service.decoders._running(server.app.service.decoders._all[0]))
        pid = server.app.service.decoders.pids()[0]
        os.kill(pid, signal.SIGSTOP)
        reply = server.chat(chat_body("What?", data_url(picture())))
        assert (reply.status, reply.code) == (400, "invalid_image")
        assert "too much time" in reply.json()["error"]["message"]
        assert server.app.service.decoders.num_killed == 1
        reply = server.chat(chat_body("What?", data_url(picture(0, 4000, 4000))))
        assert "too much time" in reply.json()["error"]["message"]  # of a core, not by the clock
        assert server.app.service.decoders.num_killed == 2
        assert server.chat(chat_body("What?", data_url(picture()))).status == 200
    with running(
        ServerConfig(port=0, decoder_bytes=300 << 20, max_image_pixels=1 << 28, max_images_pixels=1 << 28, max_held_pixels=1 << 28)
    ) as server:
        reply = server.chat(chat_body("What?", data_url(png(8000, 8000, b"\0" * (1001 * 8000)))))
        assert reply.status == 400
        assert server.chat(chat_body()).status == 200


@pytest.mark.catalogue("E19")
def test_a_server_that_is_told_to_stop_lets_answers_finish() -> None:
    with running() as server:
        plain = started(server, max_tokens=200)
        server.loop.call_soon_threadsafe(server.leaving.ask)
        assert waited(lambda: server.app.gate.is_draining)
        assert server.chat(chat_body()).code == "shutting_down"
        assert b"data: [DONE]" in rest(plain)


@pytest.mark.catalogue("E24", "E23")
def test_a_key_has_so_many_requests_at_a_time_and_no_part_of_anothers() -> None:
    first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    with running(ServerConfig(port=0, max_per_key=2), keys=KEYS) as server:
        busy = [started(server, first) for _ in range(2)]
        assert server.chat(chat_body(), first).status == 429
        assert server.chat(chat_body(), second).status == 200
        busy.pop().close()
        assert waited(lambda: server.app.gate.num_inside == 1)
        assert server.chat(chat_body(), first).status == 200
        busy.pop().close()
        assert server.is_quiet()


@pytest.mark.catalogue("G2", "G3", "G5")
def test_what_one_key_asked_is_not_found_by_another() -> None:
    first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    body = chat_body("How many things are there? " * 10, data_url(picture(7)))
    with running(keys=KEYS) as server:

        def found(headers: dict[str, str]) -> tuple[str, int, int]:
            before = server.engine.stats()
            text = server.chat(body, headers).json()["choices"][0]["message"]["content"]
            after = server.engine.stats()
            return text, after.num_found_tokens - before.num_found_tokens, after.num_found_pictures - before.num_found_pictures

        text, *nothing = found(first)
        assert nothing == [0, 0]
        again, tokens, _ = found(first)
        assert tokens > 0
        others, *nothing = found(second)
        assert nothing == [0, 0]
        assert text == again == others


def serve(*arguments: str, logs: Path = Path(os.devnull), prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start the command."""
    command = [*prefix, str(Path(sys.executable).with_name("llava")), "serve", "--port", "0", *arguments]
    with logs.open("w") as stderr:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def port_of(process: subprocess.Popen[str]) -> int:
    """Wait until it serves, and return its port."""
    assert process.stdout is not None
    address = process.stdout.readline()
    found = re.search(r":(\d+)$", address.strip())
    assert found is not None, address
    return int(found.group(1))


def ended(process: subprocess.Popen[str], number: int) -> int:
    """Send a signal and return the exit code."""
    with process:
        process.send_signal(number)
        return process.wait(20)


@pytest.mark.catalogue("E19", "E20")
def test_the_command_starts_after_a_kill_and_stops_when_told() -> None:
    killed = serve()
    with socket.create_connection(("127.0.0.1", port_of(killed))) as plain:
        plain.sendall(request_bytes({**chat_body(**LONG, stream=True), "model": "llava-miniature"}))
        assert plain.recv(100).startswith(b"HTTP/1.1 200")
        assert ended(killed, signal.SIGKILL) == -signal.SIGKILL
    again = serve("--max-images", "3")
    assert port_of(again)
    assert ended(again, signal.SIGINT) == 0


@pytest.mark.catalogue("E25", "E19")
def test_without_file_descriptors_it_answers_whom_it_knows_and_then_everybody(tmp_path: Path) -> None:
    process = serve(logs=tmp_path / "logs", prefix=("bash", "-c", 'ulimit -n 64; exec "$@"', "bash"))
    port = port_of(process)
    asked = json.dumps({**chat_body("What?", data_url(picture(1))), "model": "llava-miniature"})

    def status(connection: http.client.HTTPConnection) -> int:
        connection.request("POST", "/v1/chat/completions", asked, {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            response.read()
            return response.status

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as known:
        assert status(known) == 200
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        assert waited(lambda: "Too many open files" in (tmp_path / "logs").read_text("utf-8"))
        assert status(known) == 200
    for plain in idle:
        plain.close()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as another:
        assert status(another) == 200
    assert ended(process, signal.SIGTERM) == 0
    records = [line for line in (tmp_path / "logs").read_text("utf-8").splitlines() if "Too many" in line]
    assert 1 <= len(records) < 10
    assert all(json.loads(record)["message"] == "the event loop failed" for record in records)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--host", "0.0.0.0"), 2, "--api-key-file"),
        (("--model", "/nowhere"), 3, "/nowhere"),
        (("--api-key-file", "/nowhere"), 2, "/nowhere"),
        (("--max-images", "0"), 2, "max_images"),
        (("--adapters", "x"), 2, "NAME=FOLDER"),
        (("--port", "99999"), 2, "port must be from 0 to 65535"),
        (("--kv-memory", "1"), 5, "cache"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: tuple[str, ...], code: int, complaint: str) -> None:
    port = () if "--port" in arguments else ("--port", "0")
    command = [str(Path(sys.executable).with_name("llava")), "serve", *port, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
