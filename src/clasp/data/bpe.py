"""Word pieces by byte-pair encoding: CLIP's own 49,408, or as many as wanted, learned from the captions at hand.

In goes the file of CLIP's merges, or captions and a number; out comes a backend for ``data.text.Tokenizer`` that puts a
start and an end token around every text. Both read text in lower case, and know every byte. Unusual: of what CLIP does
to text first (ftfy), only quotes are made straight; a caption with broken Unicode or ``&amp;`` in it becomes other ids.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from clasp.types import UserError

CLIP_VOCAB_SIZE = 49_408
_START_TOKEN, _END_TOKEN = "<|startoftext|>", "<|endoftext|>"
_SPECIAL_TOKENS = (_START_TOKEN, _END_TOKEN)
# runs of letters, single digits, runs of anything else, English endings apart (Radford et al., ICML 2021)
_WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"


def load_clip_bpe(merges: Path) -> Tokenizer:
    """CLIP's tokenizer from its file of merges (gzip; a heading, then a merge a line): start 49406, end 49407."""
    with gzip.open(merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    letters = _byte_alphabet()
    count = (
        CLIP_VOCAB_SIZE - 2 * len(letters) - len(_SPECIAL_TOKENS)
    )  # the file goes on with merges that CLIP does not use
    pairs = [(first, second) for first, second in (line.split() for line in lines[1 : count + 1])]
    pieces = [*letters, *(letter + _END_OF_WORD for letter in letters), *(first + second for first, second in pairs)]
    ids = {piece: number for number, piece in enumerate((*pieces, *_SPECIAL_TOKENS))}
    backend = Tokenizer(models.BPE(ids, pairs, unk_token=_END_TOKEN, end_of_word_suffix=_END_OF_WORD))
    backend.normalizer = _normalizer()
    words = pre_tokenizers.Split(Regex(_WORD_PATTERN), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return _add_special_tokens(backend)


def train_bpe(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """At most ``vocab_size`` pieces that make these captions short, the same from the same captions in any order.

    Sennrich et al. (ACL 2016) over bytes, as GPT-2 has it; the two marks come first. Few captions give fewer pieces.
    Raises ``UserError`` for a count that has no room for every byte.
    """
    letters = _byte_alphabet()
    if vocab_size < len(letters) + len(_SPECIAL_TOKENS):
        raise UserError(
            f"text.net.vocabulary = {vocab_size}: learned word pieces begin with {len(letters)} bytes and "
            f"{len(_SPECIAL_TOKENS)} marks, so take at least {len(letters) + len(_SPECIAL_TOKENS)}"
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIAL_TOKENS), initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    return _add_special_tokens(backend)


def _byte_alphabet() -> list[str]:
    """The 256 bytes as visible letters in CLIP's order: those that are visible themselves, then the others."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]


def _normalizer() -> normalizers.Normalizer:
    """Lower case, straight quotes, single spaces."""
    replaced = {r"\s+": " ", "[‘’‚‛]": "'", "[“”„‟]": '"'}
    steps = (normalizers.Replace(Regex(pattern), plain) for pattern, plain in replaced.items())
    return normalizers.Sequence([normalizers.NFC(), *steps, normalizers.Strip(), normalizers.Lowercase()])


def _add_special_tokens(backend: Tokenizer) -> Tokenizer:
    marks = [(mark, backend.token_to_id(mark)) for mark in _SPECIAL_TOKENS]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_START_TOKEN} $A {_END_TOKEN}", special_tokens=marks
    )
    return backend
