"""The cache folder: as set, in the home of the user, or one line."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from clasp.data.cache_folder import cache_folder
from clasp.data.pairs import open_pairs
from clasp.types import UserError


def test_without_a_home_folder_the_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setenv("CLASP_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "clasp"
    monkeypatch.setenv("CLASP_CACHE", "~/c")
    assert cache_folder() == tmp_path / "c"
    monkeypatch.setenv("CLASP_CACHE", "~nobody-of-this-name/c")
    with pytest.raises(UserError, match="CLASP_CACHE=~nobody-of-this-name/c: there is no such home folder"):
        cache_folder()
    monkeypatch.setenv("CLASP_CACHE", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)  # as in a container with any user number
    with pytest.raises(UserError, match="set CLASP_CACHE"):
        cache_folder()
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "there"))
    assert cache_folder() == tmp_path / "there"


def test_the_home_of_nobody_is_a_path_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="~nobody-of-this-name/pairs does not exist"):
        open_pairs("~nobody-of-this-name/pairs")
