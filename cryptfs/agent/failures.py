"""What a request that failed is answered and logged: never an argument, never a secret."""

from __future__ import annotations

import logging
from typing import Any

from cryptfs.errors import CryptfsError
from cryptfs.format.agent_codes import INTERNAL, code_of
from cryptfs.format.agent_msg import Request, encode_failure

log = logging.getLogger(__name__)

TEXT_MAX_CHARS = 1000


def failure(request: Request, error: Exception) -> tuple[str, str, bytes]:
    """(code, text for people, the encoded answer); one log line."""
    code = code_of(error)
    if code != INTERNAL:
        log.info("%s refused: %s", request.verb[:32], code)
        text = str(error)
    elif isinstance(error, CryptfsError):
        log.warning("%s failed: %s", request.verb, error)
        text = str(error)
    else:
        # The text of an exception nobody foresaw may quote its arguments; its type and place do not.
        log.error("%s failed: %s", request.verb, type(error).__name__, exc_info=_place_only(error))
        text = f"the agent failed: {type(error).__name__}"
    text = _sendable(text)
    return code, text, encode_failure(request.request_id, code, text)


def _sendable(text: str) -> str:
    """As it can be sent whatever an error quotes: a name from the client as long as a message, a path that is no UTF-8.

    Newlines would begin a line of their own in a text log.
    """
    return text[:TEXT_MAX_CHARS].replace("\n", " ").encode("utf-8", "backslashreplace").decode("utf-8")


def _place_only(error: Exception) -> tuple[type[RuntimeError], RuntimeError, Any]:
    return (RuntimeError, RuntimeError(type(error).__name__), error.__traceback__)
