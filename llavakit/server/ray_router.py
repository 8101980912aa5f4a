"""How Ray Serve chooses a replica; Ray imports this module by its name.

Owns: PrefixRouter. What it does is routing's; here is only Ray's side of it, so this is the one module that imports Ray where it begins.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from llavakit.server.routing import ranked

__all__ = ["PrefixRouter"]


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Prefers the replica of a question's key, and takes the next one where it has no room."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Order the replicas for a request, whose second argument is its key."""
        key = None if pending_request is None or len(pending_request.args) < 2 else pending_request.args[1]
        if not isinstance(key, str):
            return [candidate_replicas]
        by_name = {candidate.replica_id.unique_id: candidate for candidate in candidate_replicas}
        return [[by_name[name]] for name in ranked(list(by_name), key)]
