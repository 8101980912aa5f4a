"""Which replica answers which question, so that what one has computed before is found again.

Owns: routing_key and ranked. Refuses: knowing how busy replicas are; whoever asks takes the next one where the first has no room.
Invariant: the order for a key depends on the replicas' names alone, and a replica that comes or goes moves only its own share of the keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llavakit.processing.decode import image_digest
from llavakit.server.backend import Question
from llavakit.types import Conversation

__all__ = ["ranked", "routing_key"]

_TEXT_CHARS = 256


def routing_key(question: Question) -> str:
    """Name what questions share that are best answered by one replica: whose they are, and the first picture, or how the text begins."""
    if question.images:
        first = image_digest(question.images[0])
    elif isinstance(question.prompt, Conversation):
        first = "".join(message.text for message in question.prompt.messages)[:_TEXT_CHARS]
    else:
        first = repr(question.prompt[:_TEXT_CHARS])
    return hashlib.sha256("\0".join((question.tenant, question.adapter, first)).encode(errors="replace")).hexdigest()


def ranked(replicas: Sequence[str], key: str) -> list[str]:
    """Order replicas for a key, the one to prefer first (rendezvous hashing)."""
    return sorted(replicas, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())
