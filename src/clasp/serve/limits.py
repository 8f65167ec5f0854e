"""Limits of the server: how much of anything a request may ask for.

Input: nothing. Output: ``ServeLimits``, plain data with defaults. Note: what exceeds a limit is answered with a 4xx and
one line; a full queue with 429, a model that takes too long with 503.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLimits:
    """The limits of one server."""

    upload_bytes: int = 20 * 1024 * 1024
    """Bytes in the body of a request."""
    pixels: int = 64_000_000
    """Pixels of an uploaded image, and of an indexed one to make a thumbnail of."""
    text_chars: int = 1000
    """Characters of a text, an id or a filter."""
    k: int = 500
    """Hits in one answer."""
    depth: int = 10_000
    """Hits down to which a ranking can be read by offset."""
    parts: int = 32
    """Texts, images and ids of one query, and filters."""
    images: int = 8
    """Images of one query."""
    texts: int = 1000
    """Class names of one classification, and texts of one embedding request."""
    waiting: int = 64
    """Requests to the model that run or wait; further ones are refused with 429."""
    seconds: float = 30.0
    """Wall-clock time in which a body must arrive, and the model must answer."""
