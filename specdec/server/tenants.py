"""Who asks, and whose memory is theirs."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

SCHEME = b"bearer "


class Tenants:
    """Those who may ask: each has a token of its own. Without tokens anybody may, as one tenant.

    Args:
        tokens: none of them empty.

    Raises:
        ValueError: an empty token, or one that does not fit into a header.
    """

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        if not all(token.isascii() and token.isprintable() and token.strip() == token != "" for token in tokens):
            raise ValueError("a token is printable ASCII without spaces around it, and not empty")
        self.tokens = [token.encode() for token in tokens]

    def find(self, header: bytes) -> bytes | None:
        """The token in an Authorization header; None if it is not one of ours. All are compared, in constant time."""
        if not self.tokens:
            return b""
        given = header[len(SCHEME) :].strip() if header[: len(SCHEME)].lower() == SCHEME else b""
        found = [token for token in self.tokens if hmac.compare_digest(token, given)]
        return found[0] if found else None


def namespace(token: bytes, user: str | None) -> str:
    """Whose memory drafters may use: a tenant's user's own, from which the token cannot be told."""
    return hmac.new(token, (user or "").encode(), hashlib.sha256).hexdigest()
