"""Byte-pair encoding: CLIP's vocabulary of 49,408 tokens, or one of any size learned from captions.

Input: CLIP's merges file, or captions and a vocabulary size. Output: a backend for ``data.tokenizer.Tokenizer`` that
puts a start and an end token around every text. Both are lower-case and byte-level. Note: of CLIP's text cleaning
(ftfy), only quotes are normalised; a caption with broken Unicode or ``&amp;`` in it gets other ids.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from clasp.plain_types import UserError

CLIP_VOCAB_SIZE = 49_408
_START_TOKEN, _END_TOKEN = "<|startoftext|>", "<|endoftext|>"
_SPECIAL_TOKENS = (_START_TOKEN, _END_TOKEN)
# English contractions, runs of letters, single digits, runs of anything else (Radford et al., ICML 2021)
_WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"


def load_clip_bpe(merges: Path) -> Tokenizer:
    """CLIP's tokenizer from its merges file (gzip; a header, then one merge per line): start 49406, end 49407."""
    with gzip.open(merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    letters = _byte_alphabet()
    count = CLIP_VOCAB_SIZE - 2 * len(letters) - len(_SPECIAL_TOKENS)  # the file has further merges, unused by CLIP
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
    """Learn a BPE vocabulary of at most ``vocab_size`` tokens; the order of the captions does not matter.

    Sennrich et al. (ACL 2016) over bytes, as in GPT-2; the two special tokens come first. Few captions give fewer
    tokens. Raises ``UserError`` for a size below the byte alphabet and the special tokens.
    """
    letters = _byte_alphabet()
    if vocab_size < len(letters) + len(_SPECIAL_TOKENS):
        raise UserError(
            f"text.net.vocabulary = {vocab_size}: a learned vocabulary includes {len(letters)} bytes and "
            f"{len(_SPECIAL_TOKENS)} special tokens, so take at least {len(letters) + len(_SPECIAL_TOKENS)}"
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
    """The 256 bytes as printable characters in CLIP's order: printable bytes first, then the others."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]


def _normalizer() -> normalizers.Normalizer:
    """NFC, single spaces, straight quotes, lower case."""
    replaced = {r"\s+": " ", "[‘’‚‛]": "'", "[“”„‟]": '"'}
    steps = (normalizers.Replace(Regex(pattern), plain) for pattern, plain in replaced.items())
    return normalizers.Sequence([normalizers.NFC(), *steps, normalizers.Strip(), normalizers.Lowercase()])


def _add_special_tokens(backend: Tokenizer) -> Tokenizer:
    special = [(token, backend.token_to_id(token)) for token in _SPECIAL_TOKENS]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_START_TOKEN} $A {_END_TOKEN}", special_tokens=special
    )
    return backend
