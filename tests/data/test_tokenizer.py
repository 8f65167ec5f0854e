"""Token ids of tiny tokenizers built here, against ids written by hand."""

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from clasp.data.tokenizer import CAPTION_CLEANERS, Tokenizer
from clasp.types import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "in", "snow", "##s", "query", ":", "runs"]


def wordpiece() -> tokenizers.Tokenizer:
    """BERT's kind: ``[CLS] words [SEP]``."""
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def unigram() -> tokenizers.Tokenizer:
    """XLM-R's kind: ``<s> pieces </s>``, pad 1, spaces as a piece of the word."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁dog", -1.5), ("▁", -2.25), ("d", -4.0), ("o", -4.0), ("g", -4.0), ("犬", -3.1), ("▁query:", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 3, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    backend.enable_padding(pad_id=1, pad_token="<pad>", length=128)  # as some hub files do: not to be obeyed
    backend.enable_truncation(128)
    return backend


def byte_bpe() -> tokenizers.Tokenizer:
    """A decoder language model's kind: bytes, no special token at all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "do", "dog", "Ġa"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("d", "o"), ("do", "g"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


KINDS = {"wordpiece": wordpiece, "unigram": unigram, "byte_bpe": byte_bpe}
TEXTS = ["a dog in snow", "dog", "dogs 犬 a a a a a a a a", "A  cat\n"]


# --- ids -----------------------------------------------------------------------------------------------------------


def test_known_ids() -> None:
    assert Tokenizer(wordpiece()).encode(["A dog in snow", "dogs"]) == [[2, 4, 5, 7, 8, 3], [2, 5, 9, 3]]
    assert Tokenizer(unigram()).encode(["dog 犬", "god"]) == [[0, 4, 5, 9, 2], [0, 5, 8, 7, 6, 2]]
    assert Tokenizer(byte_bpe()).encode(["dog a"]) == [[257, 258]]


def test_a_batch_is_as_wide_as_its_longest_caption() -> None:
    tokens = Tokenizer(wordpiece(), max_tokens=77)(["a dog in snow", "dog"])
    assert tokens.ids.tolist() == [[2, 4, 5, 7, 8, 3], [2, 5, 3, 0, 0, 0]]
    assert tokens.mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert (tokens.ids.dtype, tokens.mask.dtype) == (torch.int64, torch.bool)
    assert Tokenizer(unigram(), pad_id=1)(["dog", "dog dog"]).ids.tolist() == [[0, 4, 2, 1], [0, 4, 4, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_the_slow_obvious_way(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind](), pad_id=7, max_tokens=9)
    tokens = tokenizer(TEXTS)
    rows = [tokenizer.encode([text])[0] for text in TEXTS]
    width = max(len(row) for row in rows)
    assert tokens.ids.tolist() == [row + [7] * (width - len(row)) for row in rows]
    assert tokens.mask.tolist() == [[True] * len(row) + [False] * (width - len(row)) for row in rows]


def test_no_texts() -> None:
    tokens = Tokenizer(wordpiece())([])
    assert tokens.ids.shape == tokens.mask.shape == (0, 0)


def test_over_long_captions_keep_their_ends() -> None:
    long = "a dog " * 50
    assert Tokenizer(wordpiece(), max_tokens=5)([long]).ids.tolist() == [[2, 4, 5, 4, 3]]
    assert Tokenizer(unigram(), max_tokens=4)([long]).ids.tolist() == [[0, 5, 3, 2]]
    assert Tokenizer(byte_bpe(), max_tokens=3)(["dog a a a a"]).ids.tolist() == [[257, 258, 258]]


def test_prefix_counts_and_is_never_cleaned() -> None:
    tokenizer = Tokenizer(wordpiece(), prefix="query: ", clean="lilt", max_tokens=6)
    assert tokenizer.encode(["Dog! in, snow"]) == [[2, 10, 11, 5, 7, 3]]


# --- LilT's two peculiarities --------------------------------------------------------------------------------------


def test_the_cls_template_has_no_end_token() -> None:
    """LilT's 25 tokens are ``[CLS]`` and 24 word pieces."""
    tokenizer = Tokenizer(wordpiece(), template="cls", max_tokens=25)
    assert tokenizer.encode(["a dog in snow"]) == [[2, 4, 5, 7, 8]]
    assert tokenizer.encode(["dog " * 40]) == [[2] + [5] * 24]
    assert Tokenizer(wordpiece(), max_tokens=25).encode(["dog " * 40]) == [[2] + [5] * 23 + [3]]


def test_the_cls_template_needs_a_first_token() -> None:
    with pytest.raises(UserError, match="adds none"):
        Tokenizer(byte_bpe(), template="cls")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('A "Dog", (running)!', "a dog running"),
        ("well-known black/white", "well known black white"),
        ("<person>'s dog:  #1; ~yes*", "persons dog 1 yes"),
        ("  two   spaces \n", "two spaces"),
        (" ".join(str(i) for i in range(40)), " ".join(str(i) for i in range(30))),
        ("MBWA Mkubwa…", "mbwa mkubwa…"),
    ],
)
def test_lilt_cleaning(text: str, clean: str) -> None:
    assert CAPTION_CLEANERS["lilt"](text) == clean
    assert CAPTION_CLEANERS["none"](text) == text


# --- fingerprint, files --------------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_every_setting() -> None:
    def other_words() -> tokenizers.Tokenizer:
        backend = wordpiece()
        backend.add_tokens(["bird"])
        return backend

    made = [
        Tokenizer(wordpiece()),
        Tokenizer(wordpiece(), prefix="query: "),
        Tokenizer(wordpiece(), max_tokens=63),
        Tokenizer(wordpiece(), pad_id=1),
        Tokenizer(wordpiece(), clean="lilt"),
        Tokenizer(wordpiece(), template="cls"),
        Tokenizer(other_words()),
        Tokenizer(unigram()),
        Tokenizer(byte_bpe()),
    ]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    assert Tokenizer(wordpiece()).fingerprint == made[0].fingerprint


@pytest.mark.parametrize("template", ["tower", "cls"])
@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_save_and_load(kind: str, template: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(KINDS[kind](), prefix="query: ", max_tokens=7, pad_id=1, clean="lilt", template=template)
    before = tokenizer(TEXTS)
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.from_folder(tmp_path / "tokenizer")
    assert torch.equal(again(TEXTS).ids, before.ids) and torch.equal(again(TEXTS).mask, before.mask)
    assert (again.settings, again.fingerprint) == (tokenizer.settings, tokenizer.fingerprint)
    again.save(tmp_path / "again")
    for file in ("tokenizer.json", "clasp_tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "tokenizer" / file).read_bytes()


def test_a_byte_level_tokenizer_is_saved_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_bpe(), max_tokens=20)
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).fingerprint == tokenizer.fingerprint
    assert Tokenizer.from_folder(tmp_path).encode(TEXTS) == tokenizer.encode(TEXTS)


def test_a_setting_given_wins_over_the_saved_one(tmp_path: Path) -> None:
    Tokenizer(wordpiece(), prefix="query: ", max_tokens=7, template="cls").save(tmp_path)
    assert Tokenizer.from_folder(tmp_path, prefix="", template="tower").encode(["dog"]) == [[2, 5, 3]]
    assert Tokenizer.from_folder(tmp_path, max_tokens=2).encode(["dog"]) == [[2, 10]]


@pytest.mark.parametrize(
    ("files", "pad_id"),
    [
        ({"tokenizer_config.json": {"pad_token": "<pad>"}}, 1),
        ({"tokenizer_config.json": {"pad_token": {"content": "<unk>"}}}, 3),
        ({"tokenizer_config.json": {"pad_token": None}, "special_tokens_map.json": {"pad_token": "</s>"}}, 2),
        ({}, 1),  # from the padding in tokenizer.json itself
    ],
    ids=["string", "object", "map", "backend"],
)
def test_a_hub_folder(files: dict, pad_id: int, tmp_path: Path) -> None:
    unigram().save(str(tmp_path / "tokenizer.json"))
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path, prefix="query: ", max_tokens=9)
    assert tokenizer.pad_id == pad_id
    assert tokenizer(["dog", "dog dog"]).ids.tolist() == [[0, 10, 4, 2, pad_id], [0, 10, 4, 4, 2]]


def test_a_hub_folder_without_a_pad_token(tmp_path: Path) -> None:
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).pad_id == 0


def test_it_pickles() -> None:
    tokenizer = Tokenizer(wordpiece(), template="cls", max_tokens=5)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS) == tokenizer.encode(TEXTS)


# --- wrong inputs --------------------------------------------------------------------------------------------------


def test_wrong_folders_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "none")
    with pytest.raises(UserError, match="it is empty"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(UserError, match=r"no tokenizer\.json in .*vocab\.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ('{"prefix": "", "lower": true}', "unknown setting 'lower'"),
        ('{"clean": "all"}', "clean = 'all' is not one of none, lilt"),
        ("[]", "no settings"),
        ("{", "not JSON"),
    ],
)
def test_wrong_saved_settings(saved: str, says: str, tmp_path: Path) -> None:
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "clasp_tokenizer.json").write_text(saved)
    with pytest.raises(UserError, match=says):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(("template", "least"), [("tower", 3), ("cls", 2)])
def test_room_for_at_least_one_word(template: str, least: int) -> None:
    assert Tokenizer(wordpiece(), max_tokens=least, template=template).encode(["a dog"])[0][:2] == [2, 4]
    with pytest.raises(UserError, match="no room"):
        Tokenizer(wordpiece(), max_tokens=least - 1, template=template)


def test_a_caption_without_any_token() -> None:
    with pytest.raises(UserError, match="''"):
        Tokenizer(byte_bpe())(["dog", ""])
