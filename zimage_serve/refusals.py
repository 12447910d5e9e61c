"""What the server answers instead of doing what a request asks. Each is one line."""

from zimage_ref.errors import ZImageError

INTERRUPTED = "the server was stopped before this was done"
BUG = "the server made a mistake: its log says more"


class UnknownError(ZImageError):
    """A request names a thing that does not exist: 404."""


class RefusedError(ZImageError):
    """A request has a value that the server does not accept: 400."""


class ConflictError(ZImageError):
    """The state of the thing does not allow the request: 409."""


class BusyError(ZImageError):
    """The request can be served later: 429."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class ClosingError(ZImageError):
    """The server is about to stop: 503."""
