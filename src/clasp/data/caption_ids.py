"""Captions to token ids and padded arrays, without torch: what ``clasp.data.tokenizer.Tokenizer`` computes with.

Input: a ``tokenizers`` backend and ``TokenizerSettings``. Output: rows of ids, or padded ids with the attention mask.
Note: nothing here imports torch, so that an exported model runs where there is none (``clasp.convert.onnx_model``);
settings are checked by ``Tokenizer``, which wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

SpecialTokenTemplate = Literal["tower", "cls"]
CaptionCleaning = Literal["none", "lilt"]
Truncation = Literal["keep_eos", "drop_eos"]
CaptionPadding = Literal["longest", "max_tokens"]

BACKEND_FILE = "tokenizer.json"
SETTINGS_FILE = "clasp_tokenizer.json"


def _lilt_clean(text: str) -> str:
    """LilT's caption cleaning: ALBEF's ``pre_caption`` with ``max_words=30``."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:30])


CAPTION_CLEANERS: dict[str, Callable[[str], str]] = {"none": lambda text: text, "lilt": _lilt_clean}


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The settings of a ``clasp.data.tokenizer.Tokenizer`` beyond the ``tokenizer.json`` of the tower; not checked."""

    prefix: str = ""
    """Prepended to every caption, after cleaning (``"query: "`` for the e5 family)."""
    max_tokens: int = 64
    """Maximum sequence length, special tokens included."""
    pad_id: int = 0
    """Id at masked positions; any will do unless the tower derives position ids from it, as RoBERTa does."""
    clean: CaptionCleaning = "none"
    """A key of ``CAPTION_CLEANERS``."""
    template: SpecialTokenTemplate = "tower"
    """``tower``: the special tokens of the tower's ``tokenizer.json``. ``cls``: the first of them only, as LilT's
    ``[CLS] words`` without ``[SEP]``."""
    truncation: Truncation = "keep_eos"
    """For texts of more than ``max_tokens``. ``keep_eos``: truncate the words, keep the end token. ``drop_eos``: keep
    the first token only. The latter equals MS-CLIP's released code, which truncates the end token away and then pools
    at the largest id, that of the start token."""
    padding: CaptionPadding = "longest"
    """``longest``: pad to the longest of the batch, masked. ``max_tokens``: pad every text to ``max_tokens``, unmasked,
    as SigLIP does."""


class CaptionIds:
    """Captions to ids. Sets padding and truncation on the backend in place."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        self.settings, self._backend = settings, backend
        backend.no_padding()
        self._head: list[int] = backend.encode("").ids[:1] if settings.template == "cls" else []
        # the backend counts special tokens towards the length only when it adds them itself
        if settings.truncation == "keep_eos":
            backend.enable_truncation(settings.max_tokens - len(self._head), direction="right")
        else:
            backend.no_truncation()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, truncated but not padded; empty for a text without tokens."""
        clean, prefix = CAPTION_CLEANERS[self.settings.clean], self.settings.prefix
        encodings = self._backend.encode_batch_fast(
            [prefix + clean(text) for text in texts], add_special_tokens=self.settings.template == "tower"
        )
        ids = [self._head + encoding.ids for encoding in encodings]
        if self.settings.truncation == "drop_eos":
            ids = [row if len(row) <= self.settings.max_tokens else row[:1] for row in ids]
        return ids

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
        """Rows of different lengths as int64, padded as ``padding`` sets it, and the attention mask."""
        settings = self.settings
        if settings.padding == "max_tokens":
            ids = [[*row, *[settings.pad_id] * (settings.max_tokens - len(row))] for row in ids]
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        padded = np.full(mask.shape, settings.pad_id, dtype=np.int64)
        padded[mask] = [number for row in ids for number in row]
        return padded, mask
