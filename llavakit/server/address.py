"""Where a server listens.

Owns: bind. Refuses: torch; an address that cannot be had is told before anything heavy is loaded.
"""

from __future__ import annotations

import socket

from llavakit.errors import CapacityError, ConfigError
from llavakit.server.config import ServerConfig
from llavakit.server.keys import Keys

__all__ = ["bind"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bind(config: ServerConfig, keys: Keys) -> socket.socket:
    """Take the address. Raises: ConfigError where it would be open to others without a key, CapacityError where it is taken."""
    if config.host not in _LOOPBACK and not len(keys) and not config.insecure:
        raise ConfigError(f"{config.host} is open to other machines; give an --api-key-file, or --insecure to serve anybody")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Where the protocol is not named asyncio leaves Nagle's algorithm on, and small pieces wait 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise CapacityError(f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another --port") from error
    return listener
