"""HTTP itself, keys, hosts, origins, logs, and the files that are served: section F, and what of C is about paths."""

import ast
import asyncio
import json
import logging
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import CapacityError, ConfigError
from llavakit.logs import show_logs
from llavakit.server.address import bind
from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.keys import Keys, WrongKeys, read_keys
from llavakit.server.pages import PAGES
from tests.serving import Running, chat_body, data_url, picture, running

KEY, OTHER = "sk-first-key", "sk-second-key"
PACKAGE = Path(__file__).parents[3] / "llavakit"


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "Connection: close", "", ""]).encode()


def post(body: bytes, *headers: str) -> bytes:
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        *headers,
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(head).encode() + body


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1]) if reply.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.catalogue("F1", "F2", "F18")
def test_every_path_but_health_and_the_page_wants_a_key() -> None:
    with running(keys=(KEY, OTHER)) as server:
        for path, handlers in server.app.routes.items():
            for method in handlers:
                reply = server.ask(method, path, {} if method == "POST" else None)
                assert (reply.status == 401) == (path not in ("/health", *PAGES)), path
        assert server.ask("GET", "/nowhere").status == 401
        for given in (
            "",
            "Bearer",
            "Bearer ",
            f"Basic {KEY}",
            f"Bearer {KEY}x",
            f"Bearer x{KEY}",
            "Bearer é",
            "Bearer " + "x" * 20_000,
            KEY,
        ):
            assert server.chat(chat_body(), {"Authorization": given.encode("latin-1").decode("latin-1")}).code == "invalid_api_key", given
        twice = post(b"{}", f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}", "Content-Length: 2")
        assert status(server.raw(twice)) == 401
        for key in (KEY, OTHER):
            assert server.chat(chat_body(), {"Authorization": f"Bearer {key}"}).status == 200
            assert server.chat(chat_body(), {"Authorization": f"bearer {key}"}).status == 200


@pytest.mark.catalogue("F1")
def test_keys_are_compared_in_constant_time_only() -> None:
    tree = ast.parse((PACKAGE / "server" / "keys.py").read_text())
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [text for text in compared if "digest" in text and not text.startswith("len(")]
    assert "hmac.compare_digest" in ast.unparse(tree)


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# comment\n{KEY}\n\n{OTHER}\n")
    assert read_keys(tmp_path / "keys") == [KEY, OTHER]
    for text in ("", "# only\n", "two words\n", "ü\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ConfigError, match="keys"):
            read_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "gone")


@pytest.mark.catalogue("F3", "C25")
@pytest.mark.parametrize(
    "path", ["/v1/models#", "//v1/models", "/v1/../v1/models", "/v1/models/", "/V1/models", "/v1%2fmodels/", "/health/", "/v1"]
)
def test_only_exact_paths_are_there(server: Running, path: str) -> None:
    assert status(server.raw(get(path))) in (400, 404)


@pytest.mark.catalogue("F3")
@pytest.mark.parametrize("host", ["a/?x=", "localhost/health#", "localhost:80@evil", "evil.example", "127.0.0.1.evil.example", ""])
def test_the_name_of_the_server_opens_nothing(host: str) -> None:
    with running(keys=(KEY,)) as server:
        reply = server.raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-For: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        assert status(reply) == 401
        assert status(server.raw(b"GET http://localhost/health/../v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) in (
            401,
            404,
        )


@pytest.mark.catalogue("C25")
def test_other_methods_are_refused(server: Running) -> None:
    for method, path in (
        ("PUT", "/v1/models"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/health"),
        ("OPTIONS", "/v1/chat/completions"),
    ):
        assert server.ask(method, path).status == 405
    head = server.ask("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")


@pytest.mark.catalogue("F4", "F22")
def test_others_are_served_with_a_key_only() -> None:
    with pytest.raises(ConfigError, match="api-key-file"):
        bind(ServerConfig(host="0.0.0.0", port=0), Keys([]))
    for config, keys in ((ServerConfig(host="0.0.0.0", port=0, insecure=True), []), (ServerConfig(host="0.0.0.0", port=0), [KEY])):
        bind(config, Keys(keys)).close()
    taken = bind(ServerConfig(port=0), Keys([]))
    taken.listen()
    with pytest.raises(CapacityError, match="choose another --port"):
        bind(ServerConfig(port=taken.getsockname()[1]), Keys([]))
    taken.close()


@pytest.mark.catalogue("F5")
def test_other_names_are_refused_without_keys(server: Running) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0", "[::2]"):
        assert server.ask("GET", "/v1/models", headers={"Host": host}).code == "host_not_allowed", host
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "[::1]:80"):
        assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 200, host
    with running(ServerConfig(port=0, allowed_hosts=("llava.example",))) as named:
        assert named.ask("GET", "/v1/models", headers={"Host": "llava.example"}).status == 200


@pytest.mark.catalogue("F6", "F7")
def test_pages_of_other_servers_are_refused_unless_named() -> None:
    good = "https://app.example"
    with running(ServerConfig(port=0, allowed_origins=(good,))) as server:
        for origin in ("https://evil.example", "null", "", "http://localhost.evil.example", f"{good}.evil", "https://app.example:444"):
            reply = server.chat(chat_body(), {"Origin": origin})
            assert reply.code == "origin_not_allowed", origin
            assert not [name for name in reply.headers if name.startswith("access-control")]
            assert server.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": origin}).status == 403
        own = server.chat(chat_body(), {"Origin": f"http://127.0.0.1:{server.port}"})
        assert own.status == 200
        asked = server.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": good})
        assert (asked.status, asked.headers["access-control-allow-origin"], asked.headers["vary"]) == (204, good, "origin")
        assert "access-control-allow-credentials" not in asked.headers
        assert server.chat(chat_body(), {"Origin": good}).headers["access-control-allow-origin"] == good


@pytest.mark.catalogue("F8")
@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/9.9\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: local\0host\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n folded: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    ],
    ids=str,
)
def test_what_is_no_http_gets_an_error_and_the_server_goes_on(server: Running, data: bytes) -> None:
    reply = server.raw(data + b"\r\n")
    assert 400 <= status(reply) < 500 or reply == b"" or b"host_not_allowed" in reply
    assert server.ask("GET", "/health").status == 200


@pytest.mark.catalogue("F8")
def test_length_and_chunks_together_are_read_once(server: Running) -> None:
    smuggled = post(b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked")
    assert server.raw(smuggled).count(b"HTTP/1.1 ") == 1


@pytest.mark.catalogue("F9")
def test_heads_have_limits(server: Running) -> None:
    assert status(server.raw(get("/health", *(f"X-{n}: 1" for n in range(120))))) == 431
    assert status(server.raw(get("/health", "X: " + "x" * 40_000))) in (400, 431)
    assert status(server.raw(get("/" + "x" * 40_000))) in (400, 431)


@pytest.mark.catalogue("F10", "F11", "C25")
@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..\\..\\x", "//etc/passwd", "/page.css/../app.py", "/C:/x", "/app.py"]
)
def test_no_path_becomes_a_file(server: Running, path: str) -> None:
    assert status(server.raw(get(path, "Range: " + ",".join(f"{n}-{n}" for n in range(500))))) in (400, 404)
    assert status(server.raw(get("/page.css", "Range: bytes=0-0,1-1"))) == 200


@pytest.mark.catalogue("F13", "F16")
def test_the_page_may_load_nothing_from_elsewhere(server: Running) -> None:
    for path in PAGES:
        headers = server.ask("GET", path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert not re.search(r"unsafe|https?:|\*", policy)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    assert server.ask("GET", "/v1/models").headers["cache-control"] == "no-store"


@pytest.mark.catalogue("F12")
def test_logs_hold_nothing_of_a_request_but_its_path(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llavakit"):
        server.chat(chat_body("my-secret-question", data_url(picture())), {"Authorization": "Bearer my-secret-key"})
        server.raw(get("/\x1b[31m%0a%0dsecret?key=my-secret-query".replace("\x1b", "%1b")))
        time.sleep(0.1)
    records = [record for record in caplog.records if record.name == "llavakit.server"]
    written = json.dumps([{**record.__dict__.get("fields", {}), "message": record.getMessage()} for record in records])
    assert "secret" not in written
    assert {record.__dict__["fields"]["route"] for record in records} <= {*server.app.routes, "other"}


@pytest.mark.catalogue("F12", "E21")
def test_log_lines_are_json_without_control_characters(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger("llavakit")
    monkeypatch.setattr(root, "handlers", [])
    show_logs(form="json")
    try:
        raise ValueError("x\ny")
    except ValueError:
        logging.getLogger("llavakit.server").exception("a\nb\x1b[31m %s", "c" * 5000, extra={"fields": {"route": "\n{"}})
    (line,) = capfd.readouterr().err.splitlines()
    value = json.loads(line)
    assert value["route"] == "\n{"
    assert len(value["message"]) <= 1024
    assert "\x1b" not in line


@pytest.mark.catalogue("E21")
def test_logs_that_cannot_be_written_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(logging.getLogger("llavakit"), "handlers", [])
    show_logs(form="json")
    handler: Any = logging.getLogger("llavakit").handlers[0]
    with (tmp_path / "log").open("w") as closed:
        pass
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - closing it fails, since it is full
    for stream in (closed, full):
        handler.stream = stream
        logging.getLogger("llavakit.server").info("x")
    with pytest.raises(OSError, match="No space"):
        full.close()
    assert capfd.readouterr().err == ""


@pytest.mark.catalogue("F19")
def test_no_label_of_a_metric_comes_from_a_request(server: Running) -> None:
    for n in range(30):
        server.ask("GET", f"/made-up-{n}")
        server.chat({**chat_body(), "model": f"made-up-{n}"})
    assert "made-up" not in server.ask("GET", "/metrics").body.decode()


@pytest.mark.catalogue("F20", "F21", "B16")
def test_nothing_is_unpickled_and_elsewhere_is_one_place() -> None:
    for path in (PACKAGE / "server").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\b(pickle|marshal|dill|yaml|eval|exec)\b", text), path
        if path.name != "fetch.py":
            assert not re.search(r"open_connection|urlopen|getaddrinfo|create_connection|requests\.(get|post)", text), path
        assert "Image.open" not in text


@pytest.mark.catalogue("F23")
def test_a_key_has_so_many_requests_a_minute() -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with running(ServerConfig(port=0, requests_per_minute=3), keys=(KEY, OTHER)) as server:
        assert [server.chat(chat_body(), headers).status for _ in range(4)] == [200, 200, 200, 429]
        reply = server.chat(chat_body(), headers)
        assert reply.code == "rate_limit_exceeded"
        assert int(reply.headers["retry-after"]) >= 1
        assert server.chat(chat_body(), {"Authorization": f"Bearer {OTHER}"}).status == 200


@pytest.mark.catalogue("F24")
def test_an_address_that_tries_keys_is_told_to_wait_and_locks_nobody_out() -> None:
    def ask(key: str) -> int:
        return server.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status

    with running(ServerConfig(port=0, wrong_keys_per_s=0.2), keys=(KEY, OTHER)) as server:
        assert ask(KEY) == 200
        assert [ask(f"sk-{number}") for number in range(4)] == [401, 401, 429, 429]
        assert ask(KEY) == ask(OTHER) == 200, "others may be behind the same address"
        assert server.ask("GET", "/v1/models").status == 401
        reply = server.ask("GET", "/v1/models", headers={"Authorization": "Bearer x"})
        assert 1 <= int(reply.headers["retry-after"]) <= 5


def test_an_address_gets_its_guesses_back_and_its_neighbours_keep_theirs() -> None:
    now = 100.0
    guesses = WrongKeys(2.0, clock=lambda: now)

    def is_refused(address: str) -> bool:
        try:
            guesses.take(address)
        except HttpError:
            return True
        return False

    assert [is_refused("here") for _ in range(21)] == [False] * 20 + [True]
    assert not is_refused("there")
    now += 1.0
    assert [is_refused("here") for _ in range(3)] == [False, False, True]
    assert not any(is_refused(f"address {number}") for number in range(5000))
    assert [is_refused(f"2001:db8::{number:x}") for number in range(21)] == [False] * 20 + [True]
    assert not is_refused("2001:db8:0:1::")
    assert [is_refused(f"::ffff:192.0.2.{number}") for number in range(21)] == [False] * 21
    assert not is_refused("here"), "so many others came that it is forgotten: memory has a bound"


def test_small_pieces_are_sent_at_once() -> None:
    async def is_undelayed() -> bool:
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(bool(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        listener = bind(ServerConfig(port=0), Keys([]))
        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await accepted

    assert asyncio.run(is_undelayed())


@pytest.mark.catalogue("E9")
def test_connections_are_kept_and_requests_answered_in_order(server: Running) -> None:
    one = b"GET /v1/models/%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as plain:
        plain.sendall(b"".join(one % n for n in range(20)) + get("/health"))
        data = b""
        while part := plain.recv(1 << 16):
            data += part
    assert data.count(b"HTTP/1.1 404") == 20
    assert data.rindex(b'"status": "ok"') > data.rindex(b"HTTP/1.1 404")
