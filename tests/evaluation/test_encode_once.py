"""Live images that are the same to the byte are embedded once by an encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from clasp.evaluation import encode_once
from clasp.evaluation.encode_once import EncodeOnce
from clasp.types import ImageInput, Pixels, PooledFeatures, TextInput


class Counting:
    """Embeds an image as its mean."""

    name, fingerprint = "counting", "0"

    def __init__(self) -> None:
        self.encoded = 0

    def embed_image(self, inputs: ImageInput) -> Tensor:
        self.encoded += len(inputs.values)
        return inputs.values.flatten(1).mean(dim=1, keepdim=True)

    def embed_text(self, inputs: TextInput) -> Tensor:
        raise AssertionError

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.embed_image(Pixels(pixels))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        raise AssertionError


def images(*contents: int) -> Pixels:
    return Pixels(torch.tensor([float(one) for one in contents])[:, None, None, None].expand(-1, 3, 2, 2), contents)


def test_an_image_is_embedded_once_and_each_has_its_own(monkeypatch):
    model = Counting()
    once = EncodeOnce(model)
    for asked, encoded in (((1, 2, 1), 2), ((2, 1), 2), ((3, 1, 3, 2), 3)):
        assert once.embed_image(images(*asked))[:, 0].tolist() == list(map(float, asked))
        assert model.encoded == encoded
    monkeypatch.setattr(encode_once, "_KEPT", 2)
    assert once.embed_image(images(1, 4))[:, 0].tolist() == [1, 4] and model.encoded == 4
    assert once.embed_image(images(2, 4))[:, 0].tolist() == [2, 4], "some were forgotten, none is another's"


def test_images_without_a_hash_are_embedded_each_time():
    model = Counting()
    once = EncodeOnce(model)
    for _ in range(2):
        once.embed_image(Pixels(torch.ones(2, 3, 2, 2)))
        once.embed_image(PooledFeatures(torch.ones(2, 4)))
        once.encode_image(torch.ones(2, 3, 2, 2))
    assert model.encoded == 12
