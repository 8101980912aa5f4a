"""The API's own description: an OpenAPI document made from the models of requests.

Owns: document.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel

from llavakit import __version__
from llavakit.server.protocol import ChatRequest, CompletionRequest, ScoreRequest, TokenizeRequest

__all__ = ["document"]

_POSTS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("/v1/chat/completions", ChatRequest, "Answer a conversation, whole or as server-sent events."),
    ("/v1/completions", CompletionRequest, "Continue texts, whole or as server-sent events."),
    ("/v1/tokenize", TokenizeRequest, "Tell the tokens of a conversation or text, and what each picture costs."),
    ("/v1/score", ScoreRequest, "Tell how likely given answers are."),
)
_GETS = (
    ("/v1/models", "List the model and its adapters."),
    ("/health", "Tell whether the engine computes; needs no key."),
    ("/ready", "Tell whether a request would be taken."),
    ("/metrics", "Counts and times for Prometheus."),
    ("/openapi.json", "This document."),
)
_ERRORS = {
    "400": "Something in the request is wrong; param says what.",
    "401": "A key is needed.",
    "403": "The page or name by which the server was called is not allowed.",
    "404": "There is no such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is of a kind that is not taken.",
    "429": "The key has too many requests; see Retry-After.",
    "503": "The server has too much to do, or shuts down; see Retry-After.",
    "504": "The request took too long.",
}


@functools.cache
def document() -> dict[str, Any]:
    """Return the document."""
    schemas: dict[str, Any] = {"Error": _error_schema()}
    paths: dict[str, Any] = {}
    for path, kind, summary in _POSTS:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
        body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses("200")}}
    for path, summary in _GETS:
        paths[path] = {"get": {"summary": summary, "responses": _responses("200")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llavakit", "version": __version__, "description": "LLaVA behind OpenAI's API."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _responses(fine: str) -> dict[str, Any]:
    failed = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {fine: {"description": "Done."}, **{status: {"description": text, **failed} for status, text in _ERRORS.items()}}


def _error_schema() -> dict[str, Any]:
    text = {"type": "string"}
    maybe = {"type": ["string", "null"]}
    inner = {
        "type": "object",
        "properties": {"message": text, "type": text, "param": maybe, "code": maybe},
        "required": ["message", "type"],
    }
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}
