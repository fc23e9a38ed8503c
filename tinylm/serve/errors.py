"""Errors in the shape that OpenAI's clients turn into their exception classes.

400 BadRequestError · 401 AuthenticationError · 403 PermissionDeniedError · 404 NotFoundError ·
429 and up: the client may try again.
"""

import traceback
from collections.abc import Mapping
from typing import Any

from tinylm.common.errors import UserError, printable

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        param: the field of the body that is wrong, such as `messages[0].content`.
        code: for programs, such as `context_length_exceeded`.
        headers: of the answer, besides those of all answers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that must be changed before it is sent again."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, seconds: int = 1) -> ApiError:
    """A request that may be sent again, unchanged, after this many seconds."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(503, message, code="overloaded", headers=headers)


def of_user_error(error: UserError, param: str | None) -> ApiError:
    """The error of a text that cannot be encoded, formatted or continued."""
    return bad_request(str(error), param)


def internal_error(error: Exception) -> ApiError:
    """An error of the model or of the server; its text may name files, so only its class is shown."""
    name = printable(type(error).__name__)
    return ApiError(500, f"The server failed ({name}); its log has the details.")


def where_of(error: BaseException) -> str:
    """The class of an error and the functions it came from, without its text."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = ", ".join(f"{frame.name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__} at {places}"
