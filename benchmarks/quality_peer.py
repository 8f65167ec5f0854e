"""The peer of the quality benchmark: transformers' VisionTextDualEncoder with peft LoRA r=8, at one learning rate.

Input: the working folder of ``benchmarks.class_photos``, a learning rate and minutes. Output: lines of
``peer-LR.jsonl``, each with the time, the steps and the validation metrics, and the weights of the best of them. Set
up as well as it can be: captions padded to the longest of the batch, no dropout, fused AdamW, pixels decoded once,
autocast in the precision and the attention kernel of clasp; LoRA on the attention of both towers, both projections,
the text pooler and the logit scale train. Note: warm-up and cosine decay follow the clock, so that the rate ends at
zero with the time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks import class_photos, peer_models, sample_data
from benchmarks.peers import repair_torchvision
from benchmarks.tuning_methods import ATTENTION
from clasp.config.build import ModelAndPreprocessing
from clasp.plain_types import Precision
from clasp.training.attention_kernel import choose_attention_kernel, use_attention_kernel
from clasp.types import ImageInput, Pixels, TextInput, Tokens

BATCH = 128  # as clasp's where towers train
EVALUATIONS = 10
LEAST_TRAINING = 5  # times as long as an evaluation, between two of them
WARMUP = 0.1  # fraction of the time


@dataclass(frozen=True)
class PeerEncoder:
    """The dual encoder as an ``Encoder`` of the evaluation."""

    model: Any
    precision: Precision = "float32"
    name: str = "VisionTextDualEncoder + peft LoRA r=8"
    fingerprint: str = ""

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        assert isinstance(inputs, Pixels), "a peer has no feature cache"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            states = self.model.vision_model(pixel_values=inputs.values)[1]
            return F.normalize(self.model.visual_projection(states).float(), dim=1)

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        assert isinstance(inputs, Tokens), "a peer has no feature cache"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            states = self.model.text_model(input_ids=inputs.ids, attention_mask=inputs.mask.long())[1]
            return F.normalize(self.model.text_projection(states).float(), dim=1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.embed_image(Pixels(pixels))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.embed_text(Tokens(tokens, mask))


def build(parts: ModelAndPreprocessing) -> nn.Module:
    """The dual encoder of our towers, with LoRA."""
    from peft import LoraConfig, get_peft_model  # noqa: TID251  # it is the peer here

    new = ["visual_projection", "text_projection", "text_model.pooler"]
    targets = sorted(ATTENTION)
    model = get_peft_model(
        peer_models.dual_encoder(parts),
        LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=new),
    )
    dict(model.named_parameters())["base_model.model.logit_scale"].requires_grad_(True)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_file(work: Path, lr: float) -> Path:
    return work / f"peer-{lr:g}.pt"


def curve_file(work: Path, lr: float) -> Path:
    return work / f"peer-{lr:g}.jsonl"


def load(work: Path, lr: float, parts: ModelAndPreprocessing) -> PeerEncoder:
    """The weights of the best evaluation."""
    model: Any = build(parts)
    with torch.no_grad():
        for name, tensor in torch.load(weights_file(work, lr)).items():
            dict(model.named_parameters())[name].copy_(tensor)
    return PeerEncoder(model.eval().get_base_model())


def train(work: Path, size: int, lr: float, seconds: float, precision: Precision, seed: int) -> None:
    """Train from now on for that long, evaluations included."""
    began = time.time()
    torch.manual_seed(seed)
    parts = sample_data.parts(sample_data.recipe(f"image.size={size}"))
    model: Any = build(parts)
    encoder = PeerEncoder(model.get_base_model(), precision)
    rival = peer_models.dual_encoder_rival(model, example=False)
    pairs = list(class_photos.open_split(work, "train"))
    pixels = class_photos.decode(pairs, parts)
    task = class_photos.zero_shot(class_photos.open_split(work, "val"), parts, data="validation")
    best, steps, taken, evaluated = -1.0, 0, 0.0, began

    def evaluate() -> None:
        nonlocal best, taken, evaluated
        start = time.time()
        metrics = task(encoder)
        now = evaluated = time.time()
        taken = now - start
        with curve_file(work, lr).open("a") as file:
            file.write(json.dumps({"time": now, "steps": steps, **metrics}) + "\n")
        if metrics["top1"] > best:
            best = metrics["top1"]
            torch.save({name: p.detach().clone() for name, p in trained(model).items()}, weights_file(work, lr))

    evaluate()
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(pairs), generator=generator).split(min(BATCH, len(pairs)))[: -1 or None]:
            passed = time.time() - began
            if passed + taken >= seconds:
                evaluate()
                return
            if time.time() - evaluated >= max(seconds / EVALUATIONS, LEAST_TRAINING * taken):
                evaluate()
            rival.optimizer.param_groups[0]["lr"] = lr * _rate(passed / seconds)
            captions = [pairs[row].captions for row in rows.tolist()]
            picks = [each[int(torch.randint(len(each), (), generator=generator))].text for each in captions]
            tokens = parts.tokenizer(picks)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                rival.optimizer.zero_grad()
                loss = rival.loss(pixels[rows], tokens.ids, tokens.mask.long())
            loss.backward()
            nn.utils.clip_grad_norm_(rival.trained, 1.0)
            rival.optimizer.step()
            steps += 1


def _rate(passed: float) -> float:
    """Linear warm-up, then a cosine to zero; ``passed`` is a fraction of the time."""
    if passed < WARMUP:
        return passed / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (passed - WARMUP) / (1 - WARMUP))))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("work", Path), ("size", int), ("lr", float), ("seconds", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), required=True)
    repair_torchvision()
    given = parser.parse_args()
    kernel = choose_attention_kernel("auto", given.precision, torch.device("cpu"))  # the one that is faster here
    with use_attention_kernel(kernel.attention):
        train(**vars(given))


if __name__ == "__main__":
    main()
