"""Normalise text files to UTF-8 with line feeds, so that rows can be located by byte ranges.

Input: a file. Output: the same file, or a converted copy in the cache folder if it is UTF-16 or UTF-32 with a BOM
(byte-order mark), or its line ends are carriage returns alone (classic Mac OS). Note: a copy has the modification time
of the file, and is made once for a file of this path, size and time.
"""

import codecs
import os
import shutil
from pathlib import Path

from clasp.data.formats.index_cache import derived_file
from clasp.plain_types import UserError

_LOOKED_AT = 1 << 20  # bytes searched for a line end
_MARKS = {  # byte-order marks, the longer first: UTF-32's little-endian one begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def plain_text(path: Path, file: Path, cache: Path | None) -> Path:
    """``file`` (``path`` in errors), or its converted copy. ``UserError`` for text that is not in its encoding."""
    with file.open("rb") as opened:
        head = opened.read(_LOOKED_AT)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if encoding is None:
        if b"\0" in head[:1000]:
            raise UserError(
                f"{path} is not UTF-8 text: it holds zero bytes; UTF-16 is read where it begins with its mark"
            )
        if b"\r" not in head or b"\n" in head:
            return file

    def copy(part: Path) -> None:
        with file.open(encoding=encoding or "utf-8-sig", newline=None) as old:
            with part.open("w", encoding="utf-8", newline="\n") as new:
                shutil.copyfileobj(old, new, 1 << 20)
        status = os.stat(file)
        os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))

    try:
        return derived_file(path, "utf8", cache, copy)
    except UnicodeError as error:
        raise UserError(f"{path} is not {(encoding or 'utf-8').upper()} text: {error}") from None
