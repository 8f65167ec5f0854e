"""Reads objects of a web server or an object storage: what they are, and their bytes.

Input: an address. Output: ``RemoteObject``, and its bytes in blocks. Note: http and https go through the standard
library, since fsspec's client for them needs a further package; all other schemes go through fsspec and the package of
that storage, which is not a requirement of clasp. Nothing is fetched but what the user's recipe names.
"""

from __future__ import annotations

import base64
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from clasp.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf")
TIMEOUT_SECONDS = 60.0  # without a byte
_BLOCK_BYTES = 1 << 20
_NOT_THERE = (400, 401, 403, 404, 405, 410)  # trying again is no use


class ShardNotReadError(Exception):
    """An attempt that failed; ``final`` where another would fail alike."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """What a storage says of an object."""

    address: str
    size: int
    """Bytes"""
    tag: str
    """ETag, or else the time of the last change; changes when the bytes change"""
    md5: str = ""
    """MD5 of the bytes in hexadecimal, as far as the storage gives one: an ETag of that form, or its ``md5Hash``"""

    @property
    def version(self) -> str:
        return f"{self.size}-{self.tag}"


def describe_object(address: str) -> RemoteObject:
    """Size and tag; raises ``ShardNotReadError``."""
    md5 = ""
    with _translated_errors(address):
        if _is_web(address):
            with _open_web(urllib.request.Request(address, method="HEAD")) as response:
                size = response.headers.get("Content-Length")
                tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        else:
            system, path = _file_system(address)
            info = system.info(path)
            size = info.get("size")
            tag = next((info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if key in info), "")
            md5 = base64.b64decode(info.get("md5Hash") or "").hex()  # of Google's, whose ETag is none
    if size is None:
        raise ShardNotReadError("the storage gives no size", final=True)
    tag = str(tag).strip('"')
    return RemoteObject(address, int(size), tag, tag if re.fullmatch(r"[0-9a-f]{32}", tag) else md5)


def read_blocks(address: str) -> Iterator[bytes]:
    """The bytes of an object; raises ``ShardNotReadError``."""
    with _translated_errors(address):
        if _is_web(address):
            opened = _open_web(urllib.request.Request(address))
        else:
            system, path = _file_system(address)
            opened = system.open(path, "rb")
        with opened:
            while block := opened.read(_BLOCK_BYTES):
                yield block


def require_storage_package(address: str) -> None:
    """``UserError`` naming the package to install where fsspec lacks that of this storage."""
    scheme = address.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise UserError(f"{address} cannot be staged: shards are read from {', '.join(SCHEMES)}")
    if _is_web(address):
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UserError(f"{address} needs a package for {scheme}://, to be installed with pip: {error}") from None


def _is_web(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def _open_web(request: urllib.request.Request) -> http.client.HTTPResponse:
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    import fsspec.core

    scheme, _, place = address.partition("://")
    return fsspec.core.url_to_fs(f"{scheme.lower()}://{place}")


@contextmanager
def _translated_errors(address: str) -> Iterator[None]:
    """Raises ``ShardNotReadError`` in place of what the network raises; storage packages raise errors of any type."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise ShardNotReadError(f"HTTP {error.code} {error.reason}", final=error.code in _NOT_THERE) from None
    except (FileNotFoundError, PermissionError) as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else "refused"
        raise ShardNotReadError(f"{reason}: {' '.join(str(error).split())}", final=True) from None
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ShardNotReadError(reason) from None
    except Exception as error:
        if _is_web(address):
            raise
        raise ShardNotReadError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
