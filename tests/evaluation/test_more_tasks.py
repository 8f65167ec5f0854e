"""k-NN, linear probe, several classes, hard negatives and Winoground, each against its formula or scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from clasp.data.pairs import Pairs, open_pairs
from clasp.evaluation.embedding_table import EmbeddingTable
from clasp.evaluation.from_pairs import image_groups, language_queries, require_validation
from clasp.evaluation.multilabel import average_precision, roc_auc
from clasp.evaluation.probe_queries import FitSet, draw_shots
from clasp.evaluation.results import EvaluationResult
from clasp.types import Caption, Pair, PooledFeatures, UserError
from toyembeddings import Unread, evaluate_embeddings, pair, unit_vectors
from toysearch import Colours

WIDTH = 6
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def evaluate(task: str, *given: Any, fit: Sequence[Pair] = ()) -> EvaluationResult:
    """The one row of a task."""
    (row,) = evaluate_embeddings(task, *given, fit=fit)
    assert row.n and set(row.chance) == set(row.metrics)
    return row


def unit(count: int, seed: int) -> Tensor:
    return unit_vectors(count, seed, WIDTH)


# --- probes ----------------------------------------------------------------------------------------------------------


def standardized(known: Tensor, vectors: Tensor) -> list[np.ndarray]:
    """Both by mean and deviation of the first."""
    mean, scale = known.double().mean(dim=0), known.double().std(dim=0, correction=0)
    return [((side - mean) / scale).numpy() for side in (known, vectors)]


def labelled(count: int, prefix: str, seed: int) -> tuple[list[Pair], Tensor, np.ndarray]:
    """Three classes that overlap."""
    labels = np.arange(count) % 3
    vectors = F.normalize(unit(count, seed) + 0.8 * torch.eye(WIDTH)[torch.tensor(labels)], dim=1)
    return [pair(f"{prefix}{n}", **{"class": f"c{label}"}) for n, label in enumerate(labels)], vectors, labels


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5)])
def test_knn_is_that_of_scikit_learn(k: int, temperature: float, tmp_path: Path):
    fit, known, fit_labels = labelled(60, "f", 1)
    asked, vectors, labels = labelled(90, "q", 2)
    images = dict(zip([p.id for p in (*fit, *asked)], torch.cat([known, vectors]), strict=True))
    options = (f"k={k}", f"temperature={temperature}", "fit=other")
    row = evaluate("knn", tmp_path, images, {}, asked, *options, fit=fit)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp((1 - far) / temperature))
    right = theirs.fit(known.numpy(), fit_labels).predict(vectors.numpy()) == labels
    assert row.metrics["top1"] == pytest.approx(right.mean(), abs=1e-6)
    assert row.metrics["mean_per_class"] == pytest.approx(np.mean([right[labels == c].mean() for c in range(3)]))
    assert row.task == "knn" and row.n == 90 and row.chance["top1"] == pytest.approx(1 / 3)


def test_the_probe_is_logistic_regression_on_standardised_embeddings(tmp_path: Path):
    fit, known, fit_labels = labelled(60, "f", 3)
    asked, vectors, labels = labelled(90, "q", 4)
    images = dict(zip([p.id for p in (*fit, *asked)], torch.cat([known, vectors]), strict=True))
    row = evaluate("probe", tmp_path, images, {}, asked, "fit=other", fit=fit)
    standard = standardized(known, vectors)
    ids = [[p.id for p, label in zip(fit, fit_labels, strict=True) if label == c] for c in range(3)]
    held_out = np.isin([p.id for p in fit], [id for of_class in ids for id in sorted(of_class)[3::4]])

    def accuracy(c: float, fitted: np.ndarray, side: np.ndarray, wanted: np.ndarray) -> float:
        model = LogisticRegression(C=c, max_iter=500).fit(standard[0][fitted], fit_labels[fitted])
        return float((model.predict(side) == wanted).mean())

    best = max(PENALTIES, key=lambda c: accuracy(c, ~held_out, standard[0][held_out], fit_labels[held_out]))
    expected = accuracy(best, held_out | True, standard[1], labels)
    assert row.metrics["top1"] == pytest.approx(expected, abs=1e-6)
    assert row.metrics["top1"] > 0.6


def test_few_shots_are_so_many_of_each_class(tmp_path: Path):
    fit, known, fit_labels = labelled(60, "f", 5)
    asked, vectors, _ = labelled(60, "q", 6)
    whole = FitSet(tuple(p.id for p in fit), known, torch.tensor(fit_labels), torch.arange(60))
    first, second = draw_shots(whole, 4, 0), draw_shots(whole, 4, 1)
    assert (
        first != second and [sorted(fit_labels[rows]) for rows in (first, second)] == [[0] * 4 + [1] * 4 + [2] * 4] * 2
    )
    turned = whole.subset(list(range(59, -1, -1)))
    assert {turned.ids[row] for row in draw_shots(turned, 4, 0)} == {whole.ids[row] for row in first}
    images = dict(zip([p.id for p in (*fit, *asked)], torch.cat([known, vectors]), strict=True))
    few, many = (
        evaluate("probe", tmp_path, images, {}, asked, "fit=other", f"shots={shots}", fit=fit).metrics["top1"]
        for shots in (1, 16)
    )
    assert few < many
    with pytest.raises(UserError, match="shots=21, and 'c0' has 20 images to fit on; give fewer shots"):
        evaluate("probe", tmp_path, images, {}, asked, "fit=other", "shots=21", fit=fit)
    for wrong in ("k=0", "k=many", "temperature=0", "temperature=warm"):
        with pytest.raises(UserError, match=f"{wrong} must be a "):
            evaluate("knn", tmp_path, images, {}, asked, wrong)


def test_half_of_the_data_is_fitted_on_where_no_other_is_given(tmp_path: Path):
    asked, vectors, _ = labelled(90, "q", 7)
    images = dict(zip([p.id for p in asked], vectors, strict=True))
    row = evaluate("knn", tmp_path, images, {}, asked)
    assert 25 < row.n < 65


# --- several classes -------------------------------------------------------------------------------------------------


def test_average_precision_and_roc_auc_are_those_of_scikit_learn():
    chance = np.random.default_rng(0)
    labels = chance.random((200, 7)) < np.linspace(0.02, 0.9, 7)
    labels[0], labels[1] = True, False
    for scores in (chance.normal(size=(200, 7)), chance.integers(0, 4, (200, 7)).astype(float), np.ones((200, 7))):
        given = torch.from_numpy(scores), torch.from_numpy(labels)
        expected = average_precision_score(labels, scores, average=None)
        np.testing.assert_allclose(average_precision(*given).numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(roc_auc(*given).numpy(), roc_auc_score(labels, scores, average=None), atol=1e-9)
    np.testing.assert_allclose(average_precision(torch.ones(200, 7), given[1]), labels.mean(axis=0))


def test_zero_shot_with_several_classes(tmp_path: Path):
    chance, names = np.random.default_rng(1), ["ant", "bee", "cow", "dog"]
    truth = chance.random((50, 4)) < 0.4
    truth[0], truth[1], truth[:, 3] = True, False, False
    images, texts = unit(50, 8), unit(4, 9)
    pairs = [
        pair(f"p{n}", classes=[name for name, has in zip(names, row, strict=True) if has])
        for n, row in enumerate(truth)
    ]
    table = dict(zip([p.id for p in pairs], images, strict=True))
    prompts = {f"a {name}": vector for name, vector in zip(names, texts, strict=True)}
    (tmp_path / "names.txt").write_text("\n".join(names))
    options = ("templates=a {}", f"classes={tmp_path / 'names.txt'}")
    row = evaluate("multilabel", tmp_path, table, prompts, pairs, *options)
    scores, labels = (images @ texts.T).numpy()[:, :3], truth[:, :3]
    assert row.metrics["mean_average_precision"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    assert row.metrics["mean_roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert row.chance["mean_average_precision"] == pytest.approx(labels.mean()) and row.n == 50
    with pytest.raises(UserError, match="p0 of zoo has no list of class names in 'label'; label= one of: classes"):
        evaluate("multilabel", tmp_path, table, prompts, pairs, "templates=a {}", "label=label")


def test_a_probe_of_several_classes_is_one_regression_for_each(tmp_path: Path):
    chance, names = np.random.default_rng(2), ["ant", "bee", "cow"]

    def made(count: int, prefix: str, seed: int) -> tuple[list[Pair], Tensor, np.ndarray]:
        truth = chance.random((count, 3)) < 0.4
        truth[0], truth[1] = True, False
        vectors = F.normalize(unit(count, seed) + torch.tensor(truth).float() @ torch.eye(3, WIDTH), dim=1)
        listed = [[name for name, has in zip(names, row, strict=True) if has] for row in truth]
        return [pair(f"{prefix}{n}", classes=classes) for n, classes in enumerate(listed)], vectors, truth

    fit, known, fit_truth = made(80, "f", 12)
    asked, vectors, truth = made(60, "q", 13)
    images = dict(zip([p.id for p in (*fit, *asked)], torch.cat([known, vectors]), strict=True))
    row = evaluate("multilabel_probe", tmp_path, images, {}, asked, "fit=other", fit=fit)
    standard = standardized(known, vectors)
    held_out = np.isin([p.id for p in fit], sorted(p.id for p in fit)[3::4])

    def precision(c: float, fitted: np.ndarray, side: np.ndarray, wanted: np.ndarray) -> float:
        models = [LogisticRegression(C=c, max_iter=500).fit(standard[0][fitted], of[fitted]) for of in fit_truth.T]
        scores = np.stack([model.decision_function(side) for model in models], axis=1)
        return float(average_precision_score(wanted, scores))

    best = max(PENALTIES, key=lambda c: precision(c, ~held_out, standard[0][held_out], fit_truth[held_out]))
    found = {c: precision(c, held_out | True, standard[1], truth) for c in PENALTIES}
    assert row.metrics["mean_average_precision"] == pytest.approx(found[best], abs=1e-6)
    assert sum(value == pytest.approx(found[best], abs=1e-6) for value in found.values()) == 1, "one penalty gives this"
    assert row.metrics["mean_average_precision"] > row.chance["mean_average_precision"] + 0.2 and row.n == 60
    with pytest.raises(UserError, match="60 of 60 images of zoo are in fit=other too"):
        evaluate("multilabel_probe", tmp_path, images, {}, asked, "fit=other", fit=asked)
    with pytest.raises(UserError, match="fit=other has no image of 1 class of zoo: 'dog'"):
        more = [*asked, pair("d", classes=["dog"])]
        evaluate("multilabel_probe", tmp_path, images, {}, more, "fit=other", fit=fit)
    one_sided = [pair("a", classes=["ant", "bee"]), pair("b", classes=["ant"])]
    other_sided = [pair("c", classes=["bee"]), pair("d", classes=["ant", "bee"])]
    images = dict(zip("abcd", unit(4, 14), strict=True))
    with pytest.raises(UserError, match="fit=other and zoo: no class is that of some images and not of others in both"):
        evaluate("multilabel_probe", tmp_path, images, {}, other_sided, "fit=other", fit=one_sided)


# --- compositional ---------------------------------------------------------------------------------------------------


def test_sugarcrepe_scoring(tmp_path: Path):
    count = 40
    pairs = [
        pair(f"p{n}", f"right {n}", negative_caption=f"wrong {n}" if n % 2 else [f"wrong {n}", f"worse {n}"])
        for n in range(count)
    ]
    images = dict(zip([p.id for p in pairs], unit(count, 10), strict=True))
    words = [f"{kind} {n}" for n in range(count) for kind in ("right", "wrong", "worse")]
    texts = dict(zip(words, unit(3 * count, 11), strict=True))
    row = evaluate("sugarcrepe", tmp_path, images, texts, pairs)
    right = []
    for n in range(count):  # evaluate.py of SugarCrepe: pos_score > neg_score
        scores = [float(images[f"p{n}"] @ texts[f"{kind} {n}"]) for kind in ("right", "wrong", "worse")]
        right.append(all(scores[0] > other for other in scores[1 : 2 if n % 2 else 3]))
    assert row.metrics["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    assert row.chance["accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    same = dict.fromkeys(words, unit(1, 0)[0])
    assert evaluate("sugarcrepe", tmp_path, images, same, pairs).metrics == pytest.approx(row.chance)
    with pytest.raises(UserError, match="p0 of zoo has no text or list of texts in 'negatives'; negative= one of: neg"):
        evaluate("sugarcrepe", tmp_path, images, texts, pairs, "negative=negatives")
    with pytest.raises(UserError, match="its caption is among its negatives: 'right 0'"):
        evaluate("sugarcrepe", tmp_path, images, texts, [pair("p0", "right 0", negative_caption="right 0")])


def test_winoground_scoring(tmp_path: Path):
    count = 60
    pairs = [pair(f"i{side} {n}", f"t{side} {n}", group=f"example {n}") for n in range(count) for side in (0, 1)]
    names = [p.id for p in pairs]
    images = dict(zip(names, unit(2 * count, 12), strict=True))
    texts = dict(zip([name.replace("i", "t") for name in names], unit(2 * count, 13), strict=True))
    row = evaluate("winoground", tmp_path, images, texts, pairs)
    found = []
    for n in range(count):  # text_correct, image_correct and group_correct of the paper's notebook
        s = {(i, t): float(images[f"i{i} {n}"] @ texts[f"t{t} {n}"]) for i in (0, 1) for t in (0, 1)}
        text = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        image = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        found.append((text and image, text, image))
    expected = dict(zip(("group_score", "text_score", "image_score"), np.mean(found, axis=0), strict=True))
    assert row.metrics == pytest.approx(expected, abs=1e-6) and row.n == count and row.interval
    same = dict.fromkeys(texts, unit(1, 0)[0])
    assert set(evaluate("winoground", tmp_path, images, same, pairs).metrics.values()) == {0.0}
    with pytest.raises(UserError, match="winoground needs two pairs in each group, and 'alone' has 1"):
        evaluate("winoground", tmp_path, images, texts, [*pairs, pair("i0 0x", group="alone")])


def test_retrieval_in_folds_is_the_mean_over_them(tmp_path: Path):
    """An image has the vector of its caption, but the last two have each other's: only in their fold is that wrong."""
    vectors = torch.eye(8)
    images = {f"i{n}": vectors[{6: 7, 7: 6}.get(n, n)] for n in range(8)}
    texts = {f"t{n}": vectors[n] for n in range(8)}
    pairs = [pair(f"i{n}", f"t{n}") for n in range(8)]
    *_, both = evaluate_embeddings("retrieval", tmp_path, images, texts, pairs, "folds=4")
    assert both.task == "retrieval" and both.language == "" and both.metrics["recall@1"] == pytest.approx(3 / 4)
    assert both.chance["recall@1"] == pytest.approx(1 / 2) and both.interval["recall@1"].low < 3 / 4
    *_, whole = evaluate_embeddings("retrieval", tmp_path, images, texts, pairs)
    assert whole.metrics["recall@1"] == pytest.approx(3 / 4) and whole.chance["recall@1"] == pytest.approx(1 / 8)
    for folds in ("1", "5", "x"):
        with pytest.raises(UserError, match=f"folds={folds} must be a whole number from 2 to 4"):
            evaluate_embeddings("retrieval", tmp_path, images, texts, pairs, f"folds={folds}")


# --- a row for each caption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"), [("retrieval", ()), ("retrieval", ("folds=2",)), ("multilingual", ("languages=en",))]
)
def test_a_row_for_each_caption_is_as_a_row_for_each_image(task: str, options: tuple[str, ...], tmp_path: Path):
    """CLIP's usual table repeats an image in as many rows as it has captions; it is one candidate all the same."""
    names = [f"i{n}" for n in range(12)]
    captions = {name: [f"{name} w{n}" for n in range(5)] for name in names}
    images = dict(zip(names, unit(12, 7), strict=True))
    texts = dict(zip([text for each in captions.values() for text in each], unit(60, 8), strict=True))

    def row(id: str, name: str, *given: str) -> Pair:
        return replace(pair(id, group=name), image=Unread(name), captions=tuple(Caption(text, "en") for text in given))

    listed = [row(name, name, *captions[name]) for name in names]
    one_each = [row(f"{name}-{n}", name, text) for name in names for n, text in enumerate(captions[name])]
    stored = {**images, **{each.id: images[each.group] for each in one_each}}
    expected, found = (
        {each.task: each.metrics for each in evaluate_embeddings(task, tmp_path, stored, texts, *args)}
        for args in ((listed, *options), (one_each, *options))
    )
    assert found == expected and len(found) >= 2


class Embedded(Colours):
    """An encoder whose inputs are embeddings."""

    def embed_text(self, inputs: Any) -> Tensor:
        return inputs.values


def test_copies_of_an_image_are_no_candidates_whatever_was_embedded():
    rows = [
        replace(pair(f"{name}{n}", f"{name}{n}", group=name), image=Unread(name)) for name in "abc" for n in range(3)
    ]

    def texts(by_id: Mapping[str, str]) -> Any:
        return lambda: [(list(by_id), PooledFeatures(unit(len(by_id), 1)))]

    (queries,) = language_queries(rows, [""], texts).values()
    table = EmbeddingTable(tuple(row.id for row in rows), unit(len(rows), 2))
    asked, found = queries.score(Embedded(), table)
    assert asked.ids == ("a0", "b0", "c0")
    assert found.predict is not None and set(found.predict()) <= set(asked.ids)


class Touched(Unread):
    """An image that notes when its version is asked, which is a look at the disk."""

    asked: ClassVar[list[str]] = []

    @property
    def version(self) -> str:
        self.asked.append(self.name)
        return "0"


def test_versions_are_asked_of_repeated_images_only():
    pairs = [replace(pair(id, group=group), image=Touched(group)) for id, group in zip("abcd", "abcb", strict=True)]
    Touched.asked.clear()
    assert image_groups(pairs) == {"a": "a", "b": "b", "c": "c"}
    assert Touched.asked == ["b", "b"]


@pytest.mark.parametrize(("stored", "candidates"), [(False, 2), (True, 3)])
def test_rows_of_a_parquet_table_that_name_one_file_are_one_candidate(stored: bool, candidates: int, tmp_path: Path):
    names = ["a.jpg", "a.jpg", "b.jpg"]
    images = [{"bytes": name.encode(), "path": name} for name in names] if stored else names
    pq.write_table(
        pa.table({"image": images, "caption": ["x", "y", "z"], "group": ["a", "a", "b"]}), tmp_path / "p.parquet"
    )
    assert len(image_groups(list(open_pairs(tmp_path / "p.parquet")))) == candidates


def test_validation_among_one_class_is_refused_early():
    def pairs(*rows: Pair) -> Pairs:
        return Pairs("zoo", [list(rows)])

    cats = pairs(*(pair(id, "cat", **{"class": "cat"}) for id in "ab"))
    dog, runs = pair("c", "dog", **{"class": "dog"}), pair("d", "a dog runs", **{"class": "dog"})
    require_validation(pairs(dog), cats)
    require_validation(cats, pairs(dog, runs))
    for train in (cats, pairs(dog, runs), pairs(runs)):
        with pytest.raises(UserError, match="at least two classes; there is only cat"):
            require_validation(train, cats)
