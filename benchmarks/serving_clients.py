"""Clients of a server in a process of their own: so many streams at once, what each got and when; or one that watches its health.

Run as a module with a task on the first line of stdin, {"port": ..., "bodies": [...]} or {"port": ..., "watch": true}, it prints a report;
who watches does so until another line comes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

HEAD = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
_LIMIT_S = 600.0
_PACE_S = 0.02


async def ask(port: int, path: str, body: Any) -> dict[str, Any]:
    """Send one request and follow its stream: status, seconds to the first token and in all, pieces of text, whether it is whole."""
    data = json.dumps(body).encode()
    began = time.perf_counter()
    found: dict[str, Any] = {"status": 0, "first_s": None, "pieces": 0, "is_whole": False}
    try:
        async with asyncio.timeout(_LIMIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD.format(path=path, length=len(data)).encode() + data)
            await writer.drain()
            found["status"] = int((await reader.readline()).split(b" ")[1])
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    found["is_whole"] = True
                elif line.startswith(b"data: ") and _has_text(line):
                    found["pieces"] += 1
                    if found["first_s"] is None:
                        found["first_s"] = time.perf_counter() - began
            writer.close()
    except (OSError, TimeoutError, IndexError, ValueError) as error:
        found["error"] = type(error).__name__
    found["seconds"] = time.perf_counter() - began
    return found


def _has_text(line: bytes) -> bool:
    choices = json.loads(line[len(b"data: ") :]).get("choices") or [{}]
    return bool(choices[0].get("delta", {}).get("content") or choices[0].get("text"))


async def health(port: int) -> float:
    """Ask /health once: the seconds that takes, infinite where it does not answer 200."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(_LIMIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = (await reader.readline()).split(b" ")[1]
            await reader.read()
            writer.close()
    except (OSError, TimeoutError, IndexError):
        return float("inf")
    return time.perf_counter() - began if status == b"200" else float("inf")


async def watch(port: int) -> list[float]:
    """Ask /health at a steady pace until stdin has something to say; who waits for an answer delays no other question."""
    is_over = asyncio.ensure_future(asyncio.to_thread(sys.stdin.readline))
    asked = []
    while not is_over.done():
        asked.append(asyncio.ensure_future(health(port)))
        await asyncio.sleep(_PACE_S)
    return await asyncio.gather(*asked)


async def run(task: dict[str, Any]) -> dict[str, Any]:
    """Do a task."""
    if task.get("watch"):
        return {"health": await watch(task["port"])}
    began = time.perf_counter()
    path = task.get("path", "/v1/chat/completions")
    clients = await asyncio.gather(*(ask(task["port"], path, body) for body in task["bodies"]))
    return {"seconds": time.perf_counter() - began, "clients": clients}


if __name__ == "__main__":
    json.dump(asyncio.run(run(json.loads(sys.stdin.readline()))), sys.stdout)
