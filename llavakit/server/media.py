"""Pictures of a request: from what it says to their bytes.

Owns: picture_bytes: data URLs, files sent along, and addresses (fetch). Refuses: opening a picture (decoders), files of the server.
Invariant: counts and sizes are checked before anything is decoded or fetched.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence

from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.fetch import Fetcher
from llavakit.server.gate import Inside
from llavakit.server.protocol import ChatMessage, ImageContent

__all__ = ["picture_bytes", "picture_places"]

_DATA = re.compile(r"data:(image/[\w.+-]{1,64})?;base64,", re.ASCII | re.IGNORECASE)
_UPLOAD = "upload:"


def picture_places(messages: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    """List the pictures of a conversation: which part each is, and its address."""
    return [
        (f"messages.{turn}.content.{place}", part.image_url.url)
        for turn, message in enumerate(messages)
        if not isinstance(message.content, str)
        for place, part in enumerate(message.content)
        if isinstance(part, ImageContent)
    ]


async def picture_bytes(
    places: Sequence[tuple[str, str]], uploads: Mapping[str, bytes], config: ServerConfig, fetcher: Fetcher, inside: Inside
) -> list[bytes]:
    """Return the bytes of a request's pictures. Raises: HttpError (400; 503 where there is no memory for what is fetched)."""
    if len(places) > config.max_images:
        raise HttpError(
            400, "too_many_images", f"the request has {len(places)} pictures, at most {config.max_images} are allowed", param="messages"
        )
    most, total = config.max_image_bytes, 0
    pictures = []
    for param, url in places:
        if url[: len("data:")].lower() == "data:":
            data = _data(url, param, most)
        elif url.startswith(_UPLOAD):
            data = _upload(url.removeprefix(_UPLOAD), uploads, param)
        else:
            data = await fetcher.fetch(url)
            inside.take(len(data))
        total += len(data)
        if len(data) > most or total > config.max_images_bytes:
            raise _too_large(param, config)
        pictures.append(data)
    return pictures


def _data(url: str, param: str, most: int) -> bytes:
    head = _DATA.match(url)
    if head is None:
        raise HttpError(400, "invalid_image", "a data URL must begin with data:image/...;base64,", param=param)
    if (len(url) - head.end()) * 3 // 4 > most + 3:
        raise HttpError(400, "image_too_large", f"a picture may have {most} bytes", param=param)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise HttpError(400, "invalid_image", "a data URL's base64 is damaged", param=param) from None


def _upload(name: str, uploads: Mapping[str, bytes], param: str) -> bytes:
    if name not in uploads:
        raise HttpError(400, "invalid_image", "a picture is to be a file of the request, and there is none of that name", param=param)
    return uploads[name]


def _too_large(param: str, config: ServerConfig) -> HttpError:
    limits = f"a picture may have {config.max_image_bytes} bytes and all of a request {config.max_images_bytes}"
    return HttpError(400, "image_too_large", limits, param=param)
