"""Layouts of published data sets, each known by a file that its folder has.

Input: a folder. Output: its pairs, or nothing where it is none of them. Note: folders of shards are expanded before
(``shard_folders``), class folders and folders with captions are ``folders``. Nothing is downloaded.
"""

from pathlib import Path

from clasp.data.formats.base import OpenedSource, PairFormat, SourceSpec
from clasp.data.formats.elevater import INDEX_FILE, LABELS_FILE, open_elevater
from clasp.data.formats.hugging_face import INFO_FILE, SPLITS_FILE, open_arrow_folder, refuse_split_folder
from clasp.data.formats.language_captions import XM3600_FILE, XTD_NAMES_FILE, open_xm3600, open_xtd

FOLDER_LAYOUTS: dict[tuple[str, ...], PairFormat] = {
    (SPLITS_FILE,): refuse_split_folder,
    (INFO_FILE,): open_arrow_folder,
    (LABELS_FILE, INDEX_FILE): open_elevater,
    (XTD_NAMES_FILE,): open_xtd,
    (XM3600_FILE,): open_xm3600,
}
"""Files that a folder of the layout has, to how it is opened; the first that applies"""


def open_published_layout(spec: SourceSpec) -> OpenedSource | None:
    """The pairs of a folder in one of the layouts."""
    for files, open_layout in FOLDER_LAYOUTS.items():
        if all((Path(spec.path) / name).is_file() for name in files):
            return open_layout(spec)
    return None
