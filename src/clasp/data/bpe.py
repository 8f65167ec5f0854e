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

CLIP_PIECES = 49_408
START, END = "<|startoftext|>", "<|endoftext|>"
MARKS = (START, END)
# runs of letters, single digits, runs of anything else, English endings apart (Radford et al., ICML 2021)
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"


def clip_pieces(merges: Path) -> Tokenizer:
    """CLIP's tokenizer from its file of merges (gzip; a heading, then a merge a line): start 49406, end 49407."""
    with gzip.open(merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    letters = _letters()
    count = CLIP_PIECES - 2 * len(letters) - len(MARKS)  # the file goes on with merges that CLIP does not use
    pairs = [(first, second) for first, second in (line.split() for line in lines[1 : count + 1])]
    pieces = [*letters, *(letter + _END_OF_WORD for letter in letters), *(first + second for first, second in pairs)]
    ids = {piece: number for number, piece in enumerate((*pieces, *MARKS))}
    backend = Tokenizer(models.BPE(ids, pairs, unk_token=END, end_of_word_suffix=_END_OF_WORD))
    backend.normalizer = _plain()
    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return _between_marks(backend)


def learned_pieces(captions: Iterable[str], count: int) -> Tokenizer:
    """At most ``count`` pieces that make these captions short, the same from the same captions in any order.

    Sennrich et al. (ACL 2016) over bytes, as GPT-2 has it; the two marks come first. Few captions give fewer pieces.
    Raises ``UserError`` for a count that has no room for every byte.
    """
    letters = _letters()
    if count < len(letters) + len(MARKS):
        raise UserError(
            f"text.net.vocabulary = {count}: learned word pieces begin with {len(letters)} bytes and {len(MARKS)} "
            f"marks, so take at least {len(letters) + len(MARKS)}"
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = _plain()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=count, special_tokens=list(MARKS), initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    return _between_marks(backend)


def _letters() -> list[str]:
    """The 256 bytes as visible letters in CLIP's order: those that are visible themselves, then the others."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]


def _plain() -> normalizers.Normalizer:
    """Lower case, straight quotes, single spaces."""
    replaced = {r"\s+": " ", "[‘’‚‛]": "'", "[“”„‟]": '"'}
    steps = (normalizers.Replace(Regex(pattern), plain) for pattern, plain in replaced.items())
    return normalizers.Sequence([normalizers.NFC(), *steps, normalizers.Strip(), normalizers.Lowercase()])


def _between_marks(backend: Tokenizer) -> Tokenizer:
    marks = [(mark, backend.token_to_id(mark)) for mark in MARKS]
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=marks)
    return backend
