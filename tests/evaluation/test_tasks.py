"""Tasks with an encoder whose answers are visible: it passes on the vectors it is given, made unit length."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from clasp.evaluation.embedding_table import embed_batches
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.tasks import MultilingualTask, RetrievalTask, ZeroShotTask
from clasp.evaluation.zeroshot import ZeroShotQueries, read_class_names, read_descriptions
from clasp.types import Evaluator, PooledFeatures, Tokens, UserError


class Mirror:
    """Embeds cached features as they are, and counts what it was asked to embed."""

    name = "mirror"
    fingerprint = "0"

    def __init__(self):
        self.images = 0
        self.texts = 0

    def encode_image(self, pixels):
        raise NotImplementedError

    def encode_text(self, tokens, mask):
        raise NotImplementedError

    def embed_image(self, inputs):
        assert torch.is_inference_mode_enabled()
        self.images += len(inputs.values)
        return F.normalize(inputs.values, dim=1)

    def embed_text(self, inputs):
        assert torch.is_inference_mode_enabled()
        self.texts += len(inputs.values)
        return F.normalize(inputs.values, dim=1)


class Collapsed(Mirror):
    """Says the same of everything."""

    def embed_image(self, inputs):
        return torch.ones(len(inputs.values), 4) / 2

    embed_text = embed_image


class Diverged(Mirror):
    def embed_image(self, inputs):
        return super().embed_image(inputs) * torch.nan


def stream(vectors, chunk=4):
    """A stream of cached features, by id, that can be read again."""
    ids = list(vectors)

    def read():
        for start in range(0, len(ids), chunk):
            names = ids[start : start + chunk]
            yield names, PooledFeatures(torch.stack([vectors[name] for name in names]))

    return read


def reader(meaning, chunk=3):
    """Prompts mean the class they name; backwards and in chunks, since order must not matter."""

    def read(texts):
        assert len(set(texts)) == len(texts)
        found = {text: next(vector for word, vector in meaning.items() if word in text) for text in texts}
        yield from stream(dict(reversed(found.items())), chunk)()

    return read


ANIMALS = ["cat", "dog", "emu", "fox"]
AXES = dict(zip(ANIMALS, torch.eye(4), strict=True))


def classes(labels, **changes):
    settings = {"labels": labels, "classes": ANIMALS, "templates": ["a {}.", "the {c}!"], "read": reader(AXES)}
    return ZeroShotQueries(**(settings | changes))


def zeroshot(seen, labels, **changes):
    """``seen``: image id to what it looks like."""
    images = stream({id: AXES[animal] for id, animal in seen.items()})
    return ZeroShotTask(data="zoo", images=images, queries=classes(labels, **changes))


# --- zero-shot -----------------------------------------------------------------------------------------------------


def test_zeroshot_by_hand():
    seen = {"1": "cat", "2": "cat", "3": "cat", "4": "dog", "5": "fox", "6": "emu"}
    labels = {"1": "cat", "2": "cat", "3": "cat", "4": "dog", "5": "dog", "6": "emu"}
    task = zeroshot(seen, labels)
    evaluator: Evaluator = task
    assert evaluator(Mirror()) == {"top1": 5 / 6, "top5": 1.0, "mean_per_class": pytest.approx((1 + 1 / 2 + 1) / 3)}
    (row,) = task.results(Mirror())
    assert row.metrics == task(Mirror())
    assert (row.task, row.data, row.language, row.n) == ("zeroshot", "zoo", "", 6)
    assert row.chance == {"top1": 0.25, "top5": 1.0, "mean_per_class": 0.25}
    assert row.interval["top1"].low < 5 / 6 < row.interval["top1"].high
    assert row.interval["top5"] == (1, 1)
    assert row.seconds > 0


def test_seconds_count_the_images_in_every_row():
    class Slow(Mirror):
        def embed_image(self, inputs):
            time.sleep(0.02)
            return super().embed_image(inputs)

    for row in multilingual({"en": AXES, "de": SWAPPED}).results(Slow()):  # 12 images, 4 a chunk
        assert row.seconds > 0.06


def test_a_row_is_a_line_of_json():
    (row,) = zeroshot({"1": "cat", "2": "dog"}, {"1": "cat", "2": "emu"}).results(Mirror())
    line = json.loads(json.dumps(asdict(row)))
    fields = {"task", "data", "language", "metrics", "chance", "n", "interval", "seconds"}
    assert set(line) == fields | {"options", "evaluation_id"}
    assert line["interval"]["top1"] == [0, 1]


def test_top5_is_more_than_top1():
    names = [f"kind{i}." for i in range(10)]
    meaning = dict(zip(names, torch.eye(10), strict=True))
    images = {str(i): 4 * meaning[names[i]] + 5 * meaning[names[(i + 1) % 10]] for i in range(10)}
    question = ZeroShotQueries(
        labels={str(i): names[i] for i in range(10)}, classes=names, templates=["{}"], read=reader(meaning)
    )
    numbers = ZeroShotTask(data="kinds", images=stream(images), queries=question)(Mirror())
    assert (numbers["top1"], numbers["top5"]) == (0, 1)


def test_prompts_are_ensembled_as_unit_vectors():
    """A template whose text has a vector a hundred times as long has no more say than another."""
    meaning = {"big cat": 100 * AXES["cat"], "small cat": AXES["fox"], "dog": AXES["dog"]}
    question = ZeroShotQueries(
        labels={"1": "cat"}, classes=["cat", "dog"], templates=["big {}", "small {}"], read=reader(meaning)
    )
    vectors = question.class_embeddings(Mirror())
    torch.testing.assert_close(vectors, torch.stack([F.normalize(AXES["cat"] + AXES["fox"], dim=0), AXES["dog"]]))


def test_descriptions_stand_in_place_of_templates(tmp_path):
    """Classes may have different numbers of them, as CuPL's have."""
    file = tmp_path / "described.json"
    file.write_text('{"cat": ["a cat purrs", "a fox with whiskers"], "dog": ["a dog"], "emu": ["not asked about"]}')
    question = classes({"1": "cat"}, classes=["cat", "dog"], descriptions=read_descriptions(file))
    vectors = question.class_embeddings(Mirror())
    torch.testing.assert_close(vectors, torch.stack([F.normalize(AXES["cat"] + AXES["fox"], dim=0), AXES["dog"]]))
    with pytest.raises(UserError, match="1 of 2 classes have no description: 'fox'"):
        classes({}, classes=["cat", "fox"], descriptions=read_descriptions(file))
    for text, wrong in (("[]", "must be an object"), ('{"cat": "purrs"}', "'cat' must have a list"), ("{", "not JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=wrong):
            read_descriptions(file)
    with pytest.raises(UserError, match="it names a JSON file"):
        read_descriptions(tmp_path / "none.json")


def test_class_names_enter_prompts_as_they_are():
    asked = []

    def read(texts):
        asked.extend(texts)
        return stream(dict.fromkeys(texts, torch.ones(2)))()

    names = [r"a\1b", "{}", "100%"]
    ZeroShotQueries(labels={}, classes=names, templates=["the {c} of {x}", "{}"], read=read).class_embeddings(Mirror())
    assert asked == [r"the a\1b of {x}", r"a\1b", "the {} of {x}", "{}", "the 100% of {x}", "100%"]


def test_images_that_are_not_asked_about_do_not_count():
    seen = {"1": "cat", "2": "cat", "3": "fox"}
    (row,) = zeroshot(seen, {"1": "cat", "2": None, "3": "dog", "gone": "emu"}).results(Mirror())
    assert (row.n, row.metrics["top1"]) == (2, 0.5)


def test_groups_widen_the_interval():
    seen = {str(i): "cat" if i // 10 % 2 else "dog" for i in range(100)}
    labels = {str(i): "cat" for i in range(100)}
    groups = {str(i): str(i // 10) for i in range(100)}
    apart, together = (
        zeroshot(seen, labels, groups=given).results(Mirror())[0].interval["top1"] for given in (None, groups)
    )
    assert together.high - together.low > 2 * (apart.high - apart.low)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["cat", "dog", "cat", "dog ", "emu"]}, "more than once: 'cat', 'dog'"),
        ({"classes": ["cat", " "]}, "an empty name, at position 1 of 2"),
        ({"classes": ["cat"]}, "there is only cat"),
        ({"templates": []}, "at least one prompt template"),
        ({"templates": ["a {}", "the {}", "a {} "]}, "the templates hold these more than once: 'a {}'"),
        ({"templates": ["a {}", "a photo of a {name}."]}, r"'a photo of a \{name\}\.' has no place"),
        ({"labels": {"7": "dogs"}}, "image '7' is labelled 'dogs', .* did you mean dog"),
    ],
)
def test_mistakes_in_classes_are_told_before_any_compute(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        classes(**({"labels": {}} | changes))
    assert "\n" not in str(caught.value)


def test_mistakes_in_images_are_told():
    with pytest.raises(UserError, match="zoo: 1 of 2 images have no label: '2'"):
        zeroshot({"1": "cat", "2": "dog"}, {"1": "cat"})(Mirror())
    with pytest.raises(UserError, match="zoo: no image is labelled"):
        zeroshot({"1": "cat"}, {"1": None})(Mirror())
    with pytest.raises(UserError, match="zoo: there are no images"):
        zeroshot({}, {"1": "cat"})(Mirror())
    with pytest.raises(UserError, match="1 of 1 images have no group: '1'"):
        zeroshot({"1": "cat"}, {"1": "cat"}, groups={})(Mirror())
    with pytest.raises(UserError, match=r"no metric 'top11'; there are .*; did you mean top1"):
        ZeroShotTask(data="zoo", images=stream({}), queries=classes({}), primary="top11")


def test_one_id_twice_is_refused():
    chunk = ["a"], PooledFeatures(torch.ones(1, 2))
    with pytest.raises(UserError, match="image ids hold these more than once: 'a'"):
        embed_batches([chunk, chunk], Mirror().embed_image, "image")


def test_class_list(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffcat\n\n  guinea pig \nÉpagneul\n", encoding="utf-8")
    assert read_class_names(path) == ["cat", "guinea pig", "Épagneul"]
    for content, message in ((b"cat\ndog\ncat\n", "once: 'cat'"), (b"\n", "empty"), (b"\xff\xfe\xff", "cannot read")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_class_names(path)
    with pytest.raises(UserError, match="cannot read the class list"):
        read_class_names(tmp_path / "none.txt")


# --- retrieval -----------------------------------------------------------------------------------------------------


def caption_vectors(groups, meaning):
    return {id: meaning[group] for id, group in groups.items()}


def retrieval(images, texts, image_meaning=AXES, text_meaning=AXES, **changes):
    """``images`` and ``texts``: id to group; each looks or reads like the vector its group has in the meanings."""
    question = RetrievalQueries(
        image_groups=images,
        text_groups=texts,
        texts=stream(caption_vectors(texts, text_meaning), chunk=3),
        **changes,
    )
    return RetrievalTask(data="zoo", images=stream(caption_vectors(images, image_meaning)), queries=question)


def test_retrieval_by_hand():
    images = {"i1": "cat", "i2": "dog", "i3": "emu"}
    texts = {"t1": "cat", "t2": "cat", "t3": "dog", "t4": "emu"}
    # captions of emus read like cats: an emu image ties with all four texts but the dog's image is clear
    task = retrieval(images, texts, text_meaning=AXES | {"emu": AXES["cat"]})
    numbers = task(Mirror())
    # image to text: cat has two right of three level; dog is first; emu is level with three others, after no one
    cat = 1 - 1 / 3  # the first of the three is a right one
    emu = 1 / 4  # all four captions score 0
    assert numbers["image_to_text/recall@1"] == pytest.approx((cat + 1 + emu) / 3)
    assert numbers["image_to_text/recall@5"] == 1
    assert numbers["image_to_text/median_rank"] == pytest.approx(1 + 1 / 3)
    # text to image: t4 finds the cat first, then the dog and the emu level
    assert numbers["text_to_image/recall@1"] == pytest.approx(3 / 4)
    assert numbers["text_to_image/median_rank"] == 1
    for name in ("recall@1", "mean_recall", "median_rank"):
        both = (numbers[f"image_to_text/{name}"] + numbers[f"text_to_image/{name}"]) / 2
        assert numbers[name] == pytest.approx(both)
    assert task.primary in numbers
    rows = task.results(Mirror())
    assert [(row.task, row.n) for row in rows] == [
        ("retrieval/image_to_text", 3),
        ("retrieval/text_to_image", 4),
        ("retrieval", 7),
    ]
    assert rows[0].chance["recall@1"] == pytest.approx((2 + 1 + 1) / 4 / 3)
    assert rows[1].chance["recall@1"] == pytest.approx(1 / 3)
    assert rows[1].chance["median_rank"] == 2
    assert set(rows[2].interval) == {"recall@1", "recall@5", "recall@10", "mean_recall"}
    low, high = rows[2].interval["mean_recall"]
    assert low < numbers["mean_recall"] < high


def test_images_of_one_group_are_right_for_each_others_captions():
    images = {"photo": "cat", "drawing": "cat", "other": "dog"}
    numbers = retrieval(images, {"t": "cat", "u": "dog"})(Mirror())
    assert numbers["text_to_image/recall@1"] == 1


def test_items_without_counterpart_stay_in_the_gallery_unasked():
    images = {"i1": "cat", "i2": "dog"}
    texts = {"t1": "cat", "lost": "emu"}  # its image could not be read; it reads exactly like a cat
    first, second, _ = retrieval(images, texts, text_meaning=AXES | {"emu": AXES["cat"]}).results(Mirror())
    assert (first.n, first.metrics["recall@1"]) == (1, 0.5)
    assert (second.n, second.metrics["recall@1"]) == (1, 1)


def many(count, width=64):
    meaning = {f"g{i}": vector for i, vector in enumerate(torch.eye(width)[:count])}
    return (
        meaning,
        {f"i{i}": f"g{i}" for i in range(count)},
        {f"t{i}-{j}": f"g{i}" for i in range(count) for j in (0, 1)},
    )


def test_collapsed_embeddings_are_at_chance_in_every_task():
    meaning, images, texts = many(40)
    rows = retrieval(images, texts, meaning, meaning).results(Collapsed())
    rows += zeroshot({"1": "cat", "2": "dog"}, {"1": "cat", "2": "dog"}).results(Collapsed())
    for row in rows:
        assert row.metrics == pytest.approx(row.chance)
    assert rows[1].metrics["recall@10"] == pytest.approx(10 / 40)
    assert rows[1].metrics["median_rank"] == pytest.approx(20.5)
    assert rows[3].metrics["top1"] == pytest.approx(0.25)


def test_shuffled_pairs_are_at_chance():
    meaning, images, texts = many(60)
    assert retrieval(images, texts, meaning, meaning)(Mirror())["mean_recall"] == 1
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    wrong = {f"g{i}": torch.rand(64, generator=torch.Generator().manual_seed(order[i])) for i in range(60)}
    (first, second, _) = retrieval(images, texts, meaning, wrong).results(Mirror())
    for row in (first, second):
        low, high = row.interval["recall@5"]
        assert low <= row.chance["recall@5"] <= high
        assert high < 0.4


def test_diverged_embeddings_are_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"zoo: the embedding of image .1. is not finite, and those of 1 more"
    ) as caught:
        zeroshot({"1": "cat", "2": "dog"}, {"1": "cat", "2": "dog"})(Diverged())
    assert "\n" not in str(caught.value)


def test_mistakes_in_captions_are_told():
    with pytest.raises(UserError, match=r"no group is common to images \('dog'\) and captions \('cat'\)"):
        retrieval({"i": "dog"}, {"t": "cat"})
    with pytest.raises(UserError, match="one or both of image_to_text, text_to_image"):
        retrieval({"i": "cat"}, {"t": "cat"}, directions=())
    with pytest.raises(UserError, match=r"there is no metric 'mean_recal'; there are .*; did you mean mean_recall"):
        question = retrieval({"i": "cat"}, {"t": "cat"}).queries
        RetrievalTask(data="zoo", images=stream(AXES), queries=question, primary="mean_recal")
    question = RetrievalQueries(image_groups={"i": "cat"}, text_groups={"t": "cat"}, texts=stream({"u": AXES["cat"]}))
    with pytest.raises(UserError, match="1 of 1 captions have no group: 'u'"):
        RetrievalTask(data="zoo", images=stream({"i": AXES["cat"]}), queries=question)(Mirror())


# --- multilingual --------------------------------------------------------------------------------------------------


def multilingual(readings, images=None, primary="macro:all/image_to_text/recall@1", **changes):
    """``readings``: language to how its words are understood; each animal has one name."""
    images = images or {f"{animal}{i}": animal for animal in ANIMALS for i in range(3)}
    questions = {
        language: RetrievalQueries(
            image_groups=images,
            text_groups={animal: animal for animal in meaning},
            texts=stream(dict(meaning)),
        )
        for language, meaning in readings.items()
    }
    settings = {"sets": {"all": list(readings)}, "primary": primary}
    return MultilingualTask(
        data="zoo", images=stream(caption_vectors(images, AXES)), queries=questions, **(settings | changes)
    )


SWAPPED = AXES | {"cat": AXES["dog"], "dog": AXES["cat"]}
READINGS = {"en": AXES, "de": SWAPPED, "sw": {"cat": AXES["cat"], "emu": AXES["cat"]}}


def test_languages_and_their_macro_means():
    encoder = Mirror()
    task = multilingual(READINGS, sets={"all": ["en", "de", "sw"], "low": ["sw"]})
    numbers = task(encoder)
    assert encoder.images == 12  # once, not once a language
    assert encoder.texts == 4 + 4 + 2
    each = [numbers[f"{language}/image_to_text/recall@1"] for language in ("en", "de", "sw")]
    assert each == [1, 0.5, 0.5]  # Swahili names two animals, both as cats: only those are asked about
    assert numbers["macro:all/image_to_text/recall@1"] == pytest.approx(2 / 3)
    assert numbers["macro:low/image_to_text/recall@1"] == 0.5
    assert numbers["macro:all/recall@1"] == pytest.approx(
        (numbers["en/recall@1"] + numbers["de/recall@1"] + numbers["sw/recall@1"]) / 3
    )
    rows = {(row.language, row.task): row for row in task.results(encoder)}
    assert len(rows) == (3 + 2) * 3
    swahili, macro = (rows[language, "multilingual/image_to_text"] for language in ("sw", "macro:all"))
    assert (swahili.n, macro.n) == (6, 12 + 12 + 6)
    assert swahili.chance["recall@1"] == 0.5
    assert macro.chance["recall@1"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 2) / 3)
    assert macro.seconds > swahili.seconds > 0


def test_a_macro_interval_resamples_the_images_common_to_all_languages():
    readings = {"en": AXES, "de": SWAPPED, "nl": SWAPPED, "da": {**AXES, "emu": AXES["fox"], "fox": AXES["emu"]}}
    task = multilingual(readings, primary="de/recall@1", sets={"same": ["de", "nl"], "opposite": ["de", "da"]})
    rows = {row.language: row for row in task.results(Mirror()) if row.task == "multilingual/image_to_text"}
    assert rows["de"].interval["recall@1"] == rows["nl"].interval["recall@1"]
    # two languages that fail alike are together as uncertain as alone; where one fails and the other does not,
    # every draw gives one half
    assert rows["macro:same"].interval["recall@1"] == rows["de"].interval["recall@1"]
    assert rows["de"].interval["recall@1"] == (0, 1)
    assert rows["macro:opposite"].interval["recall@1"] == pytest.approx((0.5, 0.5))


def test_classes_can_be_asked_in_many_languages():
    names = {"en": ANIMALS, "de": ["Katze", "Hund", "Emu", "Fuchs"]}
    images = {f"{animal}{i}": animal for animal in ANIMALS for i in range(2)}
    questions = {
        language: ZeroShotQueries(
            labels={id: words[ANIMALS.index(animal)] for id, animal in images.items()},
            classes=words,
            templates=["{}"],
            read=reader(dict(zip(words, SWAPPED.values(), strict=True)) if language == "de" else AXES),
        )
        for language, words in names.items()
    }
    task = MultilingualTask(
        data="zoo",
        images=stream(caption_vectors(images, AXES)),
        queries=questions,
        sets={"all": ["en", "de"]},
        primary="macro:all/top1",
    )
    numbers = task(Mirror())
    assert (numbers["en/top1"], numbers["de/top1"], numbers[task.primary]) == (1, 0.5, 0.75)
    assert numbers["macro:all/mean_per_class"] == 0.75


def test_results_do_not_depend_on_the_order_of_reading():
    images = {f"{animal}{i}": animal for animal in ANIMALS for i in range(3)}
    rows, again = (
        multilingual(READINGS, images=dict(order)).results(Mirror())
        for order in (images.items(), reversed(images.items()))
    )
    for a, b in zip(rows, again, strict=True):
        assert a.metrics == pytest.approx(b.metrics)
        assert [*a.interval] == [*b.interval]
        for name in a.interval:
            assert a.interval[name] == pytest.approx(b.interval[name])


def test_no_intervals_where_none_are_wanted():
    rows = multilingual(READINGS, resamples=0).results(Mirror())
    assert all(row.interval == {} for row in rows)


def test_mistakes_in_languages_are_told():
    with pytest.raises(UserError, match=r"the set 'low' names 'sv'; there are en, de, sw$"):
        multilingual(READINGS, sets={"low": ["sv"]})
    with pytest.raises(UserError, match="at least one language"):
        multilingual(READINGS, sets={"low": []})
    with pytest.raises(UserError, match="no language to ask in"):
        multilingual({})
    with pytest.raises(UserError, match="there is no metric 'macro:high/recall@1'"):
        multilingual(READINGS, primary="macro:high/recall@1")
    mixed = {**multilingual(READINGS).queries, "xx": classes({})}
    with pytest.raises(UserError, match="the set 'all' mixes queries"):
        MultilingualTask(data="zoo", images=stream(AXES), queries=mixed, sets={"all": list(mixed)}, primary="xx/top1")
    unread = RetrievalQueries(image_groups={"cat0": "cat"}, text_groups={"t": "cat"}, texts=stream({}))
    with pytest.raises(UserError, match="zoo in 'so': there are no captions to evaluate on"):
        MultilingualTask(
            data="zoo", images=stream({"cat0": AXES["cat"]}), queries={"so": unread}, primary="so/recall@1"
        )(Mirror())


def test_pixels_and_tokens_go_through_too():
    """Nothing in a task looks into its inputs."""

    class Lengths(Mirror):
        def embed_text(self, inputs):
            return F.one_hot(inputs.mask.sum(dim=1) - 1, 4).float()

    def read(texts):
        lengths = torch.tensor([ANIMALS.index(text) + 1 for text in texts])
        mask = torch.arange(4) < lengths[:, None]
        yield texts, Tokens(mask.long(), mask)

    task = zeroshot({"1": "cat", "2": "fox"}, {"1": "cat", "2": "fox"}, read=read, templates=["{}"])
    assert task(Lengths())["top1"] == 1
