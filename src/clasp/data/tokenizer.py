"""Captions to token ids and an attention mask, with the native tokenizer of the text tower.

Input: strings. Output: ``Tokens``, padded to the longest caption of the batch by default. Truncation drops words, not
the special tokens at the ends. A tokenizer is loaded from a hub folder (``tokenizer.json``) or from what ``save``
wrote. Note: the fast ``tokenizers`` backend is used directly, so no model library is needed, and the padding and
truncation stored in ``tokenizer.json`` are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import tokenizers
import torch

from clasp.data.atomic_files import replace_file, write_text_file
from clasp.data.caption_ids import (
    BACKEND_FILE,
    CAPTION_CLEANERS,
    SETTINGS_FILE,
    CaptionCleaning,
    CaptionIds,
    CaptionPadding,
    SpecialTokenTemplate,
    TokenizerSettings,
    Truncation,
)
from clasp.types import Tokens, UserError

__all__ = ["CAPTION_CLEANERS", "CaptionCleaning", "SpecialTokenTemplate", "Tokenizer", "Truncation"]


def _check_choices(settings: Mapping[str, Any]) -> None:
    known = {
        "clean": tuple(CAPTION_CLEANERS),
        "template": get_args(SpecialTokenTemplate),
        "truncation": get_args(Truncation),
        "padding": get_args(CaptionPadding),
    }
    for name, choices in known.items():
        if settings.get(name, choices[0]) not in choices:
            raise UserError(f"{name} = {settings[name]!r} is not one of {', '.join(choices)}")


class Tokenizer:
    """Captions to ``Tokens``; see the module. Stateless beyond its settings; can be pickled.

    The constructor sets padding and truncation on the backend in place, so do not build two tokenizers on one backend
    object. Raises ``UserError`` for ``max_tokens`` that leaves no room beside the special tokens, and for
    ``template="cls"`` where the backend adds no special token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, **settings: Any) -> None:
        """``settings`` are fields of ``TokenizerSettings``."""
        _check_choices(settings)
        self.settings = TokenizerSettings(**settings)
        max_tokens = self.settings.max_tokens
        self._backend = backend
        special = backend.num_special_tokens_to_add(is_pair=False)
        if self.settings.template == "cls":
            if special == 0:
                raise UserError("template = 'cls' needs a tokenizer that puts a token first, and this one adds none")
            special = 1
        if max_tokens <= special:
            raise UserError(f"max_tokens = {max_tokens} leaves no room for words beside {special} special tokens")
        self._ids = CaptionIds(backend, self.settings)

    @property
    def max_tokens(self) -> int:
        """Maximum sequence length, special tokens included."""
        return self.settings.max_tokens

    @property
    def pad_id(self) -> int:
        """Id at masked positions."""
        return self.settings.pad_id

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the token for what the vocabulary lacks; ``None`` where every text can be written (bytes)."""
        model = json.loads(self._backend.to_str())["model"]
        if model.get("byte_fallback"):
            return None
        token = model.get("unk_token")
        number = model.get("unk_id") if token is None else self._backend.token_to_id(token)
        return None if number in self._backend.encode("").ids else number  # CLIP: its end token, which bytes never need

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, such as those at both ends; without ``unknown_id``."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special) - {self.unknown_id}

    def with_settings(self, **changes: Any) -> Tokenizer:
        """A copy with some settings changed, itself where none is; ``None`` leaves a setting as it is."""
        settings = {**asdict(self.settings), **{k: v for k, v in changes.items() if v is not None}}
        if settings == asdict(self.settings):
            return self  # a copy of 250,000 pieces takes half a second
        return Tokenizer(tokenizers.Tokenizer.from_str(self._backend.to_str()), **settings)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Token ids ``[B N]`` and mask ``[B N]``; ``N`` as ``padding`` sets it, at most ``max_tokens``."""
        return self.pad(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, truncated but not padded.

        Raises ``UserError`` for a text without any token, which could not be pooled.
        """
        ids = self._ids(texts)
        for text, row in zip(texts, ids, strict=True):
            if not row:
                raise UserError(f"the caption {text!r} has no token")
        return ids

    def pad(self, ids: Sequence[Sequence[int]]) -> Tokens:
        """Rows of different lengths to ``Tokens`` ``[B N]``, padded as ``padding`` sets it."""
        padded, mask = self._ids.pad(ids)
        return Tokens(torch.from_numpy(padded), torch.from_numpy(mask))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the backend and the settings: changes whenever the same text could get other ids."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        settings = asdict(self.settings)
        if self.settings.truncation == "keep_eos":  # so that caches written before the setting existed stay valid
            del settings["truncation"]
        if self.settings.padding == "longest":
            del settings["padding"]
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` (the standard format) and ``clasp_tokenizer.json`` (the settings)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / BACKEND_FILE) as part:
            self._backend.save(str(part))
        settings = json.dumps(asdict(self.settings), indent=2, ensure_ascii=False)
        write_text_file(folder / SETTINGS_FILE, settings + "\n")

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        prefix: str | None = None,
        max_tokens: int | None = None,
        clean: CaptionCleaning | None = None,
        template: SpecialTokenTemplate | None = None,
    ) -> Tokenizer:
        """Load from a folder written by ``save``, or from a hub folder.

        An argument overrides the saved setting, and that the default. In a hub folder the pad id
        comes from ``tokenizer_config.json`` or ``special_tokens_map.json``, else from ``tokenizer.json``, else it is 0.
        Raises ``UserError`` when the folder has no readable ``tokenizer.json``.
        """
        folder = Path(folder)
        backend = _read_backend(folder)
        saved: dict[str, Any] = {}
        if (folder / SETTINGS_FILE).exists():
            saved = dict(_read_json(folder / SETTINGS_FILE))
            unknown = sorted(set(saved) - set(asdict(TokenizerSettings())))
            if unknown:
                raise UserError(f"{folder / SETTINGS_FILE}: unknown setting {unknown[0]!r}")
            _check_choices(saved)
        else:
            saved["pad_id"] = _hub_pad_id(folder, backend)
        given = {"prefix": prefix, "max_tokens": max_tokens, "clean": clean, "template": template}
        return cls(backend, **{**saved, **{name: value for name, value in given.items() if value is not None}})


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / BACKEND_FILE
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else []
        found = f"it holds {', '.join(there)}" if there else "it is empty" if folder.is_dir() else "no such folder"
        raise UserError(f"no {BACKEND_FILE} in {folder}: {found}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for everything it cannot parse
        raise UserError(f"{path} is not a tokenizer: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings")
    return value


def _hub_pad_id(folder: Path, backend: tokenizers.Tokenizer) -> int:
    """The pad id of a hub folder: its token is in one of two files, as a string or as ``{"content": ...}``."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = _read_json(folder / name).get("pad_token")
            content = token.get("content") if isinstance(token, dict) else token
            number = backend.token_to_id(content) if isinstance(content, str) else None
            if number is not None:
                return number
    return backend.padding["pad_id"] if backend.padding else 0
