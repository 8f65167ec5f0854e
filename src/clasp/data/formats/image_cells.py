"""The image in a cell of a table: bytes, or the {bytes, path} of Hugging Face's datasets.

Input: the cell. Output: the encoded image. Note: a path, or a text, is read only where there are no bytes, and inside
the folder of the table.
"""

import os
from typing import Any

from clasp.data.formats.sources import FileSource, require_inside, require_no_address
from clasp.plain_types import UserError


def image_of_cell(cell: Any, root: str, name: str) -> bytes:
    """The bytes of the cell ``name``; without bytes, the file at its path, relative to ``root``."""
    if isinstance(cell, str):
        cell = {"bytes": None, "path": cell}
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            require_no_address(cell["path"], name)
            require_inside(cell["path"], root, name)
            return FileSource(os.path.join(root, cell["path"])).read()
        cell = cell.get("bytes")
    if cell is None:
        raise UserError(f"{name} holds no image")
    if not isinstance(cell, bytes):
        raise UserError(f"{name} holds {type(cell).__name__}; an image is bytes, {{bytes, path}} or a path")
    return cell
