"""What goes wrong with a request, as OpenAI's API tells it.

Owns: HttpError, and how errors of the package become one. Invariant: messages are ours, and hold neither addresses of memory, paths, nor
text of a library; whatever is not known to be the client's fault is a 500 that says nothing.
"""

from __future__ import annotations

from llavakit.errors import AnimationError, BusyError, CapacityError, DataError, FormError, ImageError, InputError, LengthError, LlavaError

__all__ = ["HttpError", "fault_of"]

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MOST_CHARS = 500
_RETRY_S = 2


class HttpError(Exception):
    """A request that gets an error: status, OpenAI's code, one sentence, and which part of the request it is about."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_s = status, code, message, param, retry_s

    def body(self) -> dict[str, object]:
        """Return the error as OpenAI's API has it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def fault_of(error: Exception, *, param: str | None = None) -> HttpError:
    """Return what a client is told of an error."""
    match error:
        case HttpError():
            return error
        case BusyError():
            return HttpError(503, "overloaded", "the server has too much to do; try again later", retry_s=_RETRY_S)
        case CapacityError():
            return HttpError(
                400, "request_too_large", "the request needs more memory than the server has; lower max_tokens or n", param=param
            )
        case AnimationError():
            return HttpError(400, "animated_image", _told(error), param=param)
        case ImageError():
            return HttpError(400, "invalid_image", _told(error), param=param)
        case FormError():
            return HttpError(400, "invalid_value", "the form of the answer cannot be followed; simplify it", param="response_format")
        case LengthError():
            return HttpError(400, "context_length_exceeded", _told(error), param=param or "messages")
        case InputError() if not isinstance(error, DataError):
            return HttpError(400, "invalid_value", _told(error), param=param)
        case TimeoutError():
            return HttpError(504, "request_timeout", "the request took longer than the server allows")
        case LlavaError():
            return HttpError(500, "model_error", "the model failed on this request")
    return HttpError(500, "internal_error", "something went wrong in the server; its log knows the request id")


def _told(error: Exception) -> str:
    return str(error)[:_MOST_CHARS]
