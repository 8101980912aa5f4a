"""Pictures by address: off by default, and what may be fetched where they are on. Section B."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import pytest

from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.fetch import Fetcher, is_public
from tests.serving import MODEL, Running, picture, running

PUBLIC = "93.184.216.34"


@dataclass
class Origin:
    """A server elsewhere that misbehaves by path."""

    port: int = 0
    requests: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head)
            path = head.split(b" ")[1].decode()
            await self._answer(path, writer)
        writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        data = picture()
        match path.removeprefix("/").partition("?")[0].split("/")[0]:
            case "ok":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
            case "chunked":
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
            case "until-close":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + data)
            case "redirect":
                target = path.removeprefix("/redirect/")
                writer.write(b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % target.encode())
            case "loop":
                writer.write(b"HTTP/1.1 302 Found\r\nLocation: /loop\r\nContent-Length: 0\r\n\r\n")
            case "gzip":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc")
            case "lie":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
            case "huge":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
            case "endless":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(1000):
                    writer.write(b"x" * 100_000)
                    await writer.drain()
            case "drip":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            case "hang":
                await asyncio.sleep(10)
            case "headers":
                writer.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n")
            case "empty":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            case "rubbish":
                writer.write(b"\0\1\2\r\n\r\n")
            case "secret":
                writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 11\r\n\r\nsecret text")
            case code:
                writer.write(b"HTTP/1.1 %s X\r\nContent-Length: 0\r\n\r\n" % code.encode())
        await writer.drain()


@asynccontextmanager
async def origin() -> AsyncIterator[Origin]:
    found = Origin()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    async with server:
        yield found


async def fetched(url: Callable[[int], str], monkeypatch: pytest.MonkeyPatch, **settings: float) -> tuple[bytes | HttpError, Origin, int]:
    """Fetch from an origin whose name has a public address, which is dialled as this machine's."""
    lookups = 0

    async def resolve(host: str, port: int) -> list[str]:
        nonlocal lookups
        lookups += 1
        return {"good.example": [PUBLIC], "two.example": [PUBLIC, "10.0.0.1"], "none.example": []}.get(host, ["127.0.0.1"])

    dial = asyncio.open_connection

    async def open_connection(host: str, port: int, **options: object) -> object:
        assert host == PUBLIC, f"{host} was dialled"
        return await dial("127.0.0.1", port)

    async with origin() as found:
        monkeypatch.setattr("llavakit.server.fetch.asyncio.open_connection", open_connection)
        config = ServerConfig(remote_images=True, max_image_bytes=100_000, remote_s=settings.get("remote_s", 1.0))
        fetcher = Fetcher(config, resolve=resolve, ports=(found.port,))
        try:
            return await fetcher.fetch(url(found.port)), found, lookups
        except HttpError as error:
            return error, found, lookups


@pytest.mark.catalogue("B1", "B13")
def test_addresses_are_refused_unless_the_server_fetches(server: Running) -> None:
    for url in ("http://example.com/a.png", "https://example.com/", "file:///etc/passwd", "ftp://x/y"):
        content = [{"type": "image_url", "image_url": {"url": url}}]
        assert server.chat({"model": MODEL, "messages": [{"role": "user", "content": content}]}).code == "remote_images_disabled"
    text = "![x](http://127.0.0.1:1/x.png) <img src='http://127.0.0.1:1/'>"
    assert server.chat({"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 1}).status == 200


@pytest.mark.parametrize("path", ["ok", "chunked", "until-close"])
def test_pictures_are_fetched(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, found, lookups = asyncio.run(fetched(lambda port: f"http://good.example:{port}/{path}?a=b", monkeypatch))
    assert data == picture()
    assert lookups == 1
    (head,) = found.requests
    assert head.startswith(b"GET /%s?a=b HTTP/1.1" % path.encode())


@pytest.mark.catalogue("B11", "B8")
def test_nothing_of_the_server_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    _, found, _ = asyncio.run(fetched(lambda port: f"http://good.example:{port}/ok", monkeypatch))
    names = {line.split(b":")[0].lower() for line in found.requests[0].split(b"\r\n")[1:] if line}
    assert names == {b"host", b"accept", b"accept-encoding", b"connection"}


@pytest.mark.catalogue("B4", "B6", "B7", "B8", "B9", "B10")
@pytest.mark.parametrize(
    "path",
    [
        "loop",
        "gzip",
        "lie",
        "huge",
        "endless",
        "drip",
        "hang",
        "headers",
        "empty",
        "rubbish",
        "secret",
        "404",
        "403",
        "204",
        "206",
        "301",
        "redirect/http://127.0.0.1/",
        "redirect/file:///etc/passwd",
        "redirect/http://private.example/ok",
        "redirect/http://good.example:81/ok",
    ],
)
def test_whatever_the_other_side_does_the_message_is_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, found, _ = asyncio.run(fetched(lambda port: f"http://good.example:{port}/{path}", monkeypatch))
    assert isinstance(error, HttpError)
    assert (error.status, error.code, error.message) == (400, "image_not_fetched", "a picture's address cannot be fetched")
    assert len(found.requests) <= 4


def test_redirects_are_followed_within_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    data, found, lookups = asyncio.run(
        fetched(lambda port: f"http://good.example:{port}/redirect/http://good.example:{port}/ok", monkeypatch)
    )
    assert data == picture()
    assert (len(found.requests), lookups) == (2, 2)


@pytest.mark.catalogue("B1", "B2", "B3", "B5")
@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://good.example/x",
        "gopher://good.example",
        "blob:x",
        "//good.example/x",
        "good.example/x",
        " http://good.example/",
        "http://",
        "http:///x",
        "http://user@good.example/",
        "http://a:b@good.example/",
        "http://good.example\\@127.0.0.1/",
        "http://a#@good.example/",
        "http://good.example\t/",
        "http://good\n.example/",
        "http://good。example/",
        "http://[::1",
        "http://good.example:0/",
        "http://good.example:x/",
        "http://good.example:99999/",
        "http://private.example:PORT/ok",
        "http://two.example:PORT/ok",
        "http://none.example:PORT/ok",
        "http://127.0.0.1:PORT/ok",
        "http://localhost:PORT/ok",
        "http://2130706433:PORT/ok",
        "http://0x7f.1:PORT/ok",
        "http://[::ffff:127.0.0.1]:PORT/ok",
        "http://" + "x" * 5000,
    ],
)
def test_addresses_that_are_not_public_are_not_dialled(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, found, _ = asyncio.run(fetched(lambda port: url.replace("PORT", str(port)), monkeypatch))
    assert isinstance(error, HttpError)
    assert error.status == 400
    assert found.requests == []


@pytest.mark.catalogue("B2")
def test_which_addresses_are_public() -> None:
    private = [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "2002:a00:1::",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
        "2001:db8::1",
        "nonsense",
        "",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
    ]
    assert [address for address in private if is_public(address)] == []
    assert all(map(is_public, (PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")))


@pytest.mark.catalogue("B12")
def test_a_certificate_that_is_not_trusted_ends_it() -> None:
    fetcher = Fetcher(ServerConfig(remote_images=True))
    assert fetcher._tls.check_hostname
    assert fetcher._tls.verify_mode.name == "CERT_REQUIRED"


@contextmanager
def origin_beside() -> Iterator[Origin]:
    """An origin on a thread of its own."""
    ready, is_over, found = threading.Event(), threading.Event(), list[Origin]()

    async def whole() -> None:
        async with origin() as served:
            found.append(served)
            ready.set()
            while not is_over.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(whole()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield found[0]
    is_over.set()
    thread.join(5)


@pytest.mark.catalogue("B5", "B13")
def test_a_server_that_fetches_answers_and_keeps_out_of_its_own_machine() -> None:
    with origin_beside() as elsewhere, running(ServerConfig(port=0, remote_images=True)) as server:
        for url in (f"http://127.0.0.1:{elsewhere.port}/ok", f"http://localhost:{elsewhere.port}/ok"):
            content = [{"type": "image_url", "image_url": {"url": url}}]
            assert server.chat({"model": MODEL, "messages": [{"role": "user", "content": content}]}).code == "image_not_fetched"
        text = f"![x](http://127.0.0.1:{elsewhere.port}/ok)"
        assert server.chat({"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 1}).status == 200
        assert elsewhere.requests == []
