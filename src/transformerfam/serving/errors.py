"""How the server refuses: a status, and a body in the form of OpenAI's errors."""

from typing import Any

from transformerfam.errors import TransformerFamError

KINDS = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}


class ApiError(TransformerFamError):
    """A request that is not served.

    Args:
        status: HTTP status.
        message: what is wrong, what is required, what to do.
        code: a word that programs compare.
        param: the field of the request that is wrong.
        retry_after: seconds after which it may be served.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error of a request that is wrong in itself."""
    return ApiError(400, message, code, param)


def as_api_error(error: BaseException) -> ApiError:
    """Return what a client gets for an error: its message where it is one for users, nothing of others."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TransformerFamError):
        return ApiError(400, str(error), "invalid_request")
    return ApiError(
        500, "the server failed at this request, and nothing was changed; its log has the reason", "internal_error"
    )
