"""Ids, names and metadata as the HTTP API gives and takes them: they may be file names that are no valid Unicode.

Input: text as it is stored, or an id of a request. Output: text that is valid Unicode, or the stored id.
"""

from __future__ import annotations

import base64
import binascii

from clasp.plain_types import UserError

_ENCODED = "base64:"


def public_id(name: str) -> str:
    """An id as the API gives and takes it: itself, or in base64 where it is no valid Unicode."""
    if name.isprintable() and not name.startswith(_ENCODED):
        return name
    return _ENCODED + base64.urlsafe_b64encode(name.encode("utf-8", "surrogatepass")).decode()


def stored_id(public: str) -> str:
    """Inverse of ``public_id``. ``UserError`` for damaged base64."""
    if not public.startswith(_ENCODED):
        return public
    try:
        return base64.b64decode(public.removeprefix(_ENCODED).encode(), b"-_", validate=True).decode(
            "utf-8", "surrogatepass"
        )
    except (binascii.Error, ValueError):
        raise UserError(f"the id {ascii(public)[:80]} is damaged; take it from the answer of a search") from None


def readable(text: object) -> str:
    """A text in which bytes that are no valid Unicode are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()
