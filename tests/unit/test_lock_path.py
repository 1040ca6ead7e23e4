"""The one request that is written without msgpack is what msgpack would write."""

from __future__ import annotations

import pytest

from cryptfs.format.agent_msg import RequestDecoder, encode_request
from cryptfs.format.lock_path import PATH_MAX_BYTES, encode_lock_path


@pytest.mark.parametrize("size", [1, 7, 31, 32, 255, 256, PATH_MAX_BYTES])
def test_it_is_the_same_message(size: int) -> None:
    path = bytes(n % 255 + 1 for n in range(size))
    message = encode_lock_path(path)
    assert message == encode_request(1, "lock-path", {"path": path})
    [request] = RequestDecoder().feed(message)
    assert request.args == {"path": path}
