"""A run with open_clip's interface: a zero-shot evaluation as CLIP_benchmark writes it, and equality with our own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import clasp
from clasp.types import UserError
from toydata import toys, write_folder
from toyruns import recipe, run, save_towers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(recipe(save_towers(folder), write_folder(toys(40), folder / "pairs"), "train.epochs=1"), folder / "run")
    return folder / "run"


def test_embeddings_are_those_of_the_run(made: Path):
    ours = clasp.load(made, precision="float32")
    model, preprocess, tokenizer = clasp.as_open_clip(made)
    files = sorted((made.parent / "pairs").glob("*.png"))[:4]
    texts = ["a red circle", "ring", "a photo of the blue cross . a photo"]
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(file)) for file in files])
        assert torch.allclose(model.encode_image(pixels, normalize=True), ours.encode_image(files), atol=1e-6)
        tokens = tokenizer(texts)
        assert tokens.dtype == torch.long
        assert torch.allclose(model.encode_text(tokens, normalize=True), ours.encode_text(texts), atol=1e-6)
        padded = tokenizer(texts, context_length=40)
        assert padded.shape == (3, 40)
        assert torch.allclose(model.encode_text(padded), model.encode_text(tokens), atol=1e-5)
        assert model.encode_text(tokens).norm(dim=1).std() > 1e-4  # not normalised unless asked for
    scale, _ = ours.encoder.scale_and_bias()  # pyright: ignore[reportAttributeAccessIssue]
    assert model.logit_scale.exp().item() == pytest.approx(scale.item())
    assert not model.training and tokenizer("a").shape[0] == 1


def test_zero_shot_classification_as_clip_benchmark_does_it(made: Path):
    """``zero_shot_classifier`` and ``run_classification`` of CLIP_benchmark, metrics/zeroshot_classification.py."""
    model, preprocess, tokenizer = clasp.as_open_clip(made)
    classnames, templates, device = ["red", "blue", "green"], ["a photo of a {c}.", "{c}"], "cpu"
    with torch.no_grad():
        weights = []
        for classname in classnames:
            texts = tokenizer([template.format(c=classname) for template in templates]).to(device)
            class_embedding = torch.nn.functional.normalize(model.encode_text(texts), dim=-1).mean(dim=0)
            weights.append(class_embedding / class_embedding.norm())
        classifier = torch.stack(weights, dim=1).to(device)
        images = torch.stack([preprocess(Image.open(file)) for file in sorted((made.parent / "pairs").glob("*.png"))])
        features = torch.nn.functional.normalize(model.encode_image(images.to(device)), dim=-1)
        logits = 100.0 * features @ classifier
        assert logits.shape == (len(images), 3)
        image, text, scale = model(images[:2], tokenizer(classnames))
        assert (scale * image @ text.T).shape == (2, 3)


def test_a_context_that_is_too_short_is_one_line(made: Path):
    tokenizer = clasp.as_open_clip(made).tokenizer
    with pytest.raises(UserError, match=r"context_length = 3: a text has \d+ tokens"):
        tokenizer(["a photo of the red circle"], context_length=3)
