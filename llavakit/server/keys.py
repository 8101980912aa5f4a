"""Who may ask.

Owns: Keys and Caller. Invariants: keys are kept and compared as digests, in constant time; what a key is called in logs and in the cache
says nothing of it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavakit.errors import ConfigError
from llavakit.logs import logger
from llavakit.server.allowance import Allowance
from llavakit.server.faults import HttpError

__all__ = ["Caller", "Keys", "WrongKeys", "read_keys"]

_LOG = logger("server")
_MOST_KEY_BYTES = 1024
_NAME_CHARS = 8
_LONG_KEY = 24
_BURST_S = 10.0


@dataclass(frozen=True, slots=True)
class Caller:
    """One who asks: a name for logs and limits, and what separates its cache from the others'."""

    name: str
    tenant: str


class Keys:
    """The keys of a server; without any, everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Tell who asks. Raises: HttpError (401)."""
        if not self._digests:
            return Caller("everybody", "")
        given = [value for name, value in headers if name == b"authorization"]
        key = given[0][len(b"bearer ") :] if len(given) == 1 and given[0][: len(b"bearer ")].lower() == b"bearer " else b""
        digest = hashlib.sha256(key[: _MOST_KEY_BYTES + 1]).digest()
        # All are compared, so that the time tells nothing.
        is_known = [hmac.compare_digest(digest, known) for known in self._digests]
        if not key or not any(is_known):
            raise HttpError(401, "invalid_api_key", "a valid key is needed: Authorization: Bearer KEY")
        name = hashlib.sha256(b"llavakit caller " + digest).hexdigest()
        return Caller(name[:_NAME_CHARS], name if len(self._digests) > 1 else "")


class WrongKeys:
    """Gives each address so many wrong keys a second, those of _BURST_S seconds at once.

    A right key takes nothing and always opens, so that nobody behind the same proxy is locked out.
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowance = Allowance(max(1.0, per_s * _BURST_S), per_s, "too many wrong keys came from this address", clock)

    def take(self, address: str) -> None:
        """Count one. Raises: HttpError (429)."""
        self._allowance.take(_network(address))


def _network(address: str) -> str:
    """Return what one host can speak from: an IPv4 address, or the 2**64 addresses of an IPv6 network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((int(found), 64), strict=False))


def read_keys(path: Path) -> list[str]:
    """Read keys, one a line; lines that begin with # are comments. Raises: ConfigError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys in {path}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or not all(key.isascii() and key.isprintable() and " " not in key and len(key) <= _MOST_KEY_BYTES for key in keys):
        raise ConfigError(f"{path} must hold keys of printable ASCII without spaces, one a line")
    if any(len(key) < _LONG_KEY for key in keys):
        _LOG.warning("%s holds a key of less than %d characters, which can be guessed; see openssl rand -hex 24", path, _LONG_KEY)
    return keys
