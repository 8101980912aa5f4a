"""Pictures from addresses that requests name: the only place that opens a connection to elsewhere.

Owns: Fetcher. Off unless the server is told otherwise.
Invariants: a host is looked up once a hop, every one of its addresses must be a public one, and that address is what is dialled, so that
nothing between check and use can change it; redirects are checked like the first address; bytes and seconds are bounded over all hops;
nothing of the server (keys, cookies, proxies) goes along; what the other side says is never passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError

__all__ = ["Fetcher", "Resolve", "is_public"]

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_READ_BYTES = 1 << 16
_MOST_URL_CHARS = 4096
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""resolve(host, port) -> addresses."""


class Fetcher:
    """Fetches pictures, a few at a time."""

    def __init__(self, config: ServerConfig, *, resolve: Resolve | None = None, ports: tuple[int, ...] = (80, 443)) -> None:
        """Ports are those that may be dialled; resolve looks hosts up, by default as the system does."""
        self._config, self._resolve, self._ports = config, resolve or _resolve, ports
        self._tls = ssl.create_default_context()
        self._slots = asyncio.Semaphore(4)

    async def fetch(self, url: str) -> bytes:
        """Fetch a picture. Raises: HttpError (400), the same one whatever the other side does."""
        if not self._config.remote_images:
            raise HttpError(400, "remote_images_disabled", "this server fetches no pictures; send them as data URLs", param="messages")
        try:
            async with self._slots, asyncio.timeout(self._config.remote_s):
                return await self._follow(url)
        except (OSError, TimeoutError, ValueError, h11.ProtocolError) as error:
            raise _unfetched() from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            parts = _checked(url)
            port = parts.port or _PORTS[parts.scheme]
            if port not in self._ports:
                raise _unfetched()
            address = await self._address(parts.hostname or "", port)
            status, headers, body = await self._request(parts, address, port)
            if status not in _REDIRECTS:
                if status != 200 or not body:
                    raise _unfetched()
                return body
            place = dict(headers).get(b"location", b"").decode("ascii", errors="strict")
            target = urljoin(url, place)
            if parts.scheme == "https" and urlsplit(target).scheme != "https":
                raise _unfetched()
            url = target
        raise _unfetched()

    async def _address(self, host: str, port: int) -> str:
        """Look a host up, once. Raises: HttpError where any of its addresses is not public."""
        found = await self._resolve(host, port)
        if not found or not all(is_public(address) for address in found):
            raise _unfetched()
        return found[0]

    async def _request(self, parts: SplitResult, address: str, port: int) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        is_secure = parts.scheme == "https"
        host = parts.hostname or ""
        tls = {"ssl": self._tls, "server_hostname": host} if is_secure else {}
        reader, writer = await asyncio.open_connection(address, port, **tls)  # type: ignore[arg-type]
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 15)
            name = f"[{host}]" if ":" in host else host
            shown = name if port == _PORTS[parts.scheme] else f"{name}:{port}"
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = [("Host", shown), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
            writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
            await writer.drain()
            return await self._response(reader, connection)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _response(self, reader: asyncio.StreamReader, connection: h11.Connection) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        status, headers, body = 0, list[tuple[bytes, bytes]](), bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, list(event.headers)
                known = dict(headers)
                if known.get(b"content-encoding", b"identity") != b"identity":
                    raise _unfetched()
                if int(known.get(b"content-length", b"0")) > self._config.max_image_bytes or status in _REDIRECTS:
                    return status, headers, b""
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._config.max_image_bytes:
                    raise _unfetched()
            elif isinstance(event, h11.EndOfMessage):
                return status, headers, bytes(body)
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise _unfetched()


def is_public(address: str) -> bool:
    """Tell whether an address belongs to the open internet; one inside of another kind of address counts too."""
    try:
        found = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
        if found in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast


def _checked(url: str) -> SplitResult:
    """Take an address apart. Raises: HttpError for one that two readers might take apart differently."""
    is_plain = len(url) <= _MOST_URL_CHARS and url.isascii() and url.isprintable() and not set(url) & set(' \\"<>^`{|}')
    parts = urlsplit(url)  # ValueError for brackets and ports that are none
    is_plain = is_plain and parts.scheme in _PORTS and bool(parts.hostname) and "@" not in parts.netloc
    if not is_plain or parts.port == 0:
        raise _unfetched()
    return parts


def _unfetched() -> HttpError:
    return HttpError(400, "image_not_fetched", "a picture's address cannot be fetched", param="messages")


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]
