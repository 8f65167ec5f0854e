"""The peers' models of the same two towers: open_clip's, and transformers' dual encoder; and towers saved as folders.

Input: clasp's assembled parts. Output: models with the same weights. Note: equality of their outputs with ours is
checked whenever one is built, since a comparison of different towers would be meaningless.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import imported
from benchmarks.sample_data import SIZE, WIDTH, WORK
from clasp.config.build import ModelAndPreprocessing
from clasp.models.precision import computing_in
from clasp.models.transformer.bert import BertEncoder
from clasp.models.transformer.dinov2 import Dinov2Encoder
from clasp.plain_types import Precision
from clasp.training.memory import ActivationMemory
from clasp.types import Pixels, Tokens

OPEN_CLIP_LENGTH = 77  # tokens that open_clip pads every caption to
EXAMPLE_LENGTH = 128  # and that transformers' example script for dual encoders pads to


# --- open_clip -------------------------------------------------------------------------------------------------------


def open_clip_model(parts: ModelAndPreprocessing) -> Any:
    """open_clip's model of a timm ViT and a BERT, with our weights. Its outputs are checked against ours."""
    imported("open_clip")
    from open_clip.model import CustomTextCLIP

    vision = {"timm_model_name": "vit_small_patch14_dinov2", "timm_pool": "token", "image_size": SIZE}
    text = {"hf_model_name": str(saved_text(parts)), "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    model = CustomTextCLIP(WIDTH, vision, text, output_dict=True)
    model.visual.set_input_size(SIZE)
    model.visual.trunk.load_state_dict(_as_timm(_transformers_dinov2(parts)))
    _compare(parts, lambda pixels: model.visual.trunk(pixels))
    return model


def _as_timm(net: Any) -> dict[str, Tensor]:
    """Weights of transformers' DINOv2 under timm's names, with positions for our image size."""
    blank = torch.zeros(1, 50, 384)
    tensors = {
        "cls_token": net.embeddings.cls_token,
        "pos_embed": net.embeddings.interpolate_pos_encoding(blank, SIZE, SIZE),
        "patch_embed.proj.weight": net.embeddings.patch_embeddings.projection.weight,
        "patch_embed.proj.bias": net.embeddings.patch_embeddings.projection.bias,
        "norm.weight": net.layernorm.weight,
        "norm.bias": net.layernorm.bias,
    }
    for number, block in enumerate(_layers(net)):
        linear = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        query, key, value, out, first, second = linear.values()
        for kind in ("weight", "bias"):
            into = f"blocks.{number}."
            fused = torch.cat([module.get_parameter(kind) for module in (query, key, value)])
            tensors[f"{into}attn.qkv.{kind}"] = fused
            for name, module in (
                ("norm1", block.norm1),
                ("norm2", block.norm2),
                ("attn.proj", out),
                ("mlp.fc1", first),
                ("mlp.fc2", second),
            ):
                tensors[f"{into}{name}.{kind}"] = module.get_parameter(kind)
        tensors[f"{into}ls1.gamma"] = block.layer_scale1.lambda1
        tensors[f"{into}ls2.gamma"] = block.layer_scale2.lambda1
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _layers(net: Any) -> list[nn.Module]:
    return next(list(m) for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) == 12)


@torch.no_grad()
def _compare(parts: ModelAndPreprocessing, trunk: Callable[[Tensor], Tensor]) -> None:
    """Checks that the outputs are equal to ours."""
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trunk(pixels), parts.model.image.pooled(Pixels(pixels)), rtol=1e-3, atol=1e-3)


# --- transformers ----------------------------------------------------------------------------------------------------


def dual_encoder(parts: ModelAndPreprocessing) -> Any:
    """transformers' VisionTextDualEncoder of our towers. It pools captions by BERT's pooler, which is added."""
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    text = _transformers_bert(parts, add_pooling_layer=True)
    vision = _transformers_dinov2(parts)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config, projection_dim=WIDTH)
    return VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)


def _transformers_dinov2(parts: ModelAndPreprocessing) -> Any:
    """A copy of the image tower as transformers' Dinov2Model, whose weights ours has under the same names."""
    from transformers import Dinov2Config, Dinov2Model

    net = parts.model.image.net
    assert isinstance(net, Dinov2Encoder)
    made = Dinov2Model(Dinov2Config(**asdict(net.settings), use_mask_token=False))
    made.load_state_dict(net.state_dict())
    return made.eval()


def _transformers_bert(parts: ModelAndPreprocessing, *, add_pooling_layer: bool) -> Any:
    """The text tower as transformers' BertModel, whose weights ours has under the same names."""
    from transformers import BertConfig, BertModel

    net = parts.model.text.net
    assert isinstance(net, BertEncoder)
    made = BertModel(BertConfig(**asdict(net.settings)), add_pooling_layer=add_pooling_layer)
    missing = made.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert all(name.startswith("pooler.") for name in missing), missing
    return made.eval()


# --- saved towers ----------------------------------------------------------------------------------------------------


def saved_text(parts: ModelAndPreprocessing) -> Path:
    """The text tower and its tokenizer in transformers' format."""
    from transformers import PreTrainedTokenizerFast

    folder = WORK / "text-tower"
    if not (folder / "ready").exists():
        _transformers_bert(parts, add_pooling_layer=False).save_pretrained(folder)
        parts.tokenizer.save(folder)
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        file = str(folder / "tokenizer.json")
        PreTrainedTokenizerFast(tokenizer_file=file, model_max_length=512, **special).save_pretrained(folder)
        (folder / "ready").touch()
    return folder


def saved_image(parts: ModelAndPreprocessing) -> Path:
    """The image tower with transformers' preprocessor config."""
    folder = WORK / "image-tower"
    if not (folder / "ready").exists():
        _transformers_dinov2(parts).save_pretrained(folder)
        processor = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": SIZE},
            "do_center_crop": True,
            "crop_size": {"height": SIZE, "width": SIZE},
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "image_mean": list(parts.transform.mean),
            "image_std": list(parts.transform.std),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        (folder / "ready").touch()
    return folder


@torch.no_grad()
def compare_texts(parts: ModelAndPreprocessing, pooled: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Checks that a peer's mean-pooled states are equal to ours."""
    ids = torch.randint(1000, 20000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ours = parts.model.text.pooled(Tokens(ids, mask.bool()))
    torch.testing.assert_close(pooled(ids, mask), ours, rtol=1e-3, atol=1e-3)


# --- their training step ---------------------------------------------------------------------------------------------


Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Pixels, ids and mask to the loss."""


class Rival:
    """A peer's training step: its model, its loss, AdamW over its trainable parameters; bfloat16 is autocast's."""

    def __init__(
        self,
        model: nn.Module,
        loss: Step,
        *,
        fused: bool = False,
        clip: float | None = None,
        precision: Precision = "float32",
    ):
        self.model, self.plain_loss, self.clip, self.precision = model, loss, clip, precision
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.1, fused=fused)

    def step(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> int:
        """One step; returns its pairs."""
        self.optimizer.zero_grad()
        self.loss(pixels, ids, mask).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        return len(pixels)

    def loss(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        with computing_in(self.precision, pixels.device):
            return self.plain_loss(pixels, ids, mask)

    def kept(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> int:
        """Activation memory of a step, bytes."""
        with ActivationMemory(self.model.parameters()) as kept:
            self.loss(pixels, ids, mask)
        return kept.bytes


def open_clip_rival(model: Any, precision: Precision = "float32") -> Rival:
    """As in ``open_clip_train``: its loss, no clipping, the mask from the pad token. Lock towers before."""
    loss = imported("open_clip").ClipLoss()
    model.train()
    return Rival(model, lambda pixels, ids, mask: loss(**model(pixels, ids)), precision=precision)


def dual_encoder_rival(model: Any, *, example: bool, precision: Precision = "float32") -> Rival:
    """As in transformers' example script: its trainer's AdamW, gradient norm clipped to 1, dropout on.

    ``example=False``: the fastest configuration, with fused AdamW and no dropout.
    """
    model.train(example)

    def loss(pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True).loss

    return Rival(model, loss, fused=not example, clip=1.0, precision=precision)
