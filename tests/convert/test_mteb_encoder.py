"""A run as an encoder of mteb: real task classes of MIEB on data made here, where mteb is installed."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clasp
from clasp.commands.evaluate import evaluate_run
from clasp.convert.mteb_encoder import as_mteb
from clasp.types import UserError
from toydata import toys, write_csv
from toyruns import recipe, run, save_towers

TOYS = toys(30)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mteb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(folder / "cache"))
        run(recipe(save_towers(folder / "towers"), write_csv(TOYS, folder / "pairs"), "train.epochs=4"), folder / "run")
        yield folder / "run"


def pictures() -> list[Image.Image]:
    return [Image.open(io.BytesIO(toy.png)).convert("RGB") for toy in TOYS]


def test_batches_of_texts_images_and_both(trained: Path):
    encoder, model = as_mteb(trained), clasp.load(trained)
    texts, images = [toy.caption for toy in TOYS[:4]], pictures()[:4]
    task: dict[str, Any] = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "batch_size": 2}
    text = encoder.encode([{"text": texts[:3]}, {"text": texts[3:]}], **task)
    image = encoder.encode([{"image": images}], **task)
    torch.testing.assert_close(text, model.encode_text(texts))
    torch.testing.assert_close(image, model.encode_image(images))
    both = encoder.encode([{"text": texts, "image": images}], **task)
    torch.testing.assert_close(both, text + image)
    torch.testing.assert_close(encoder.similarity(both.numpy(), text), torch.cosine_similarity(both[:, None], text, -1))
    torch.testing.assert_close(encoder.similarity_pairwise(both, text), torch.cosine_similarity(both, text))
    assert encoder.similarity(text[0], text).shape == (1, 4)
    with pytest.raises(UserError, match=r"encode: the inputs are audio; .* reads text and image"):
        encoder.encode([{"audio": [1]}])


def test_without_mteb_its_meta_data_is_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UserError, match=r"mteb cannot be imported .* pip install mteb"):
        _ = as_mteb(trained).mteb_model_meta


# --- with mteb -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mteb() -> ModuleType:
    pytest.importorskip("datasets")
    return pytest.importorskip("mteb")


def local(task: Any, columns: dict[str, list[Any]], **features: Any) -> Any:
    """A task with data made here in place of those of the hub."""
    import datasets

    split = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        split = split.cast_column(name, feature)
    task.dataset, task.data_loaded = datasets.DatasetDict({"test": split}), True
    return task


@pytest.mark.filterwarnings("ignore")
def test_a_zero_shot_task_of_mieb_has_our_number(mteb: ModuleType, trained: Path, tmp_path: Path):
    import datasets
    from mteb.models.models_protocols import EncoderProtocol
    from mteb.tasks import CIFAR10ZeroShotClassification

    encoder = as_mteb(trained)
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.embed_dim) == ("clasp/run", 16) and set(meta.modalities) == {"image", "text"}
    names = sorted({toy.shape for toy in TOYS})
    columns = {"img": pictures(), "label": [names.index(toy.shape) for toy in TOYS]}
    task = local(CIFAR10ZeroShotClassification(), columns, label=datasets.ClassLabel(names=names))
    scores = task.evaluate(encoder, "test", encode_kwargs={"batch_size": 7})["default"]
    (prompt,) = {text.replace(names[0], "{}") for text in task.get_candidate_labels() if names[0] in text}
    data = tmp_path / "classes"
    for toy in TOYS:
        (data / toy.shape).mkdir(parents=True, exist_ok=True)
        (data / toy.shape / f"{toy.key}.png").write_bytes(toy.png)
    (ours,) = evaluate_run(trained, "zeroshot", [f"data={data}", f"templates={prompt}"], out=tmp_path / "out")
    assert scores["accuracy"] == pytest.approx(ours.metrics["top1"], abs=1e-6) and 0.04 < scores["accuracy"]


@pytest.mark.filterwarnings("ignore")
def test_winoground_of_mieb_has_the_published_formula(mteb: ModuleType, trained: Path):
    from mteb.tasks import Winoground

    encoder, images = as_mteb(trained), pictures()
    rows = {"image_0": images[0::2], "image_1": images[1::2]}
    texts = {"caption_0": [toy.caption for toy in TOYS[0::2]], "caption_1": [toy.caption for toy in TOYS[1::2]]}
    scores = local(Winoground(), {**rows, **texts}).evaluate(encoder, "test", encode_kwargs={})["default"]
    vectors = (
        encoder.model.encode_image(images).view(-1, 2, 16),
        encoder.model.encode_text([toy.caption for toy in TOYS]).view(-1, 2, 16),
    )
    cosine = torch.einsum("nie,nte->nit", *vectors).numpy()
    text = (cosine[:, 0, 0] > cosine[:, 0, 1]) & (cosine[:, 1, 1] > cosine[:, 1, 0])
    image = (cosine[:, 0, 0] > cosine[:, 1, 0]) & (cosine[:, 1, 1] > cosine[:, 0, 1])
    assert {name: scores[name] for name in ("text_acc", "image_acc", "accuracy")} == pytest.approx(
        {"text_acc": np.mean(text), "image_acc": np.mean(image), "accuracy": np.mean(text & image)}, abs=1e-6
    )
