"""The parameter names of MS-CLIP's state dict and ours.

Input: the settings of two encoders. Output: a map from every name in the released state dict of such a model to the
name of the same tensor in a ``TiedEncoders`` (``image.…``, ``text.…``), or ``image_head``, ``text_head`` and
``log_scale``. A shared tensor has two names on either side. Note: MS-CLIP counts a stem as block 0, so our block
numbers after a stem are lower by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings

# prefixes of the names of either encoder's blocks
MSCLIP_IMAGE_PREFIX, MSCLIP_TEXT_PREFIX = "visual.transformer.", "transformer."
_NamePairs = Iterator[tuple[str, str]]


def msclip_name_map(image: ImageTransformerSettings, text: TextTransformerSettings) -> dict[str, str]:
    """MS-CLIP name to our name, for encoders of these settings."""
    return dict(
        [
            ("visual.class_embedding", "image.cls_token"),
            ("visual.positional_embedding", "image.pos_embed"),
            ("visual.proj", "image_head"),
            *_weight_and_bias("visual.ln_pre", "image.norm_pre"),
            *_weight_and_bias("visual.ln_post", "image.norm"),
            ("token_embedding.weight", "text.token_embed.weight"),
            ("positional_embedding", "text.pos_embed"),
            ("text_projection", "text_head"),
            *_weight_and_bias("ln_final", "text.norm"),
            ("logit_scale", "log_scale"),
            *(_patch_names() if image.stem is None else _stem_names()),
            *_block_names(MSCLIP_IMAGE_PREFIX, "image.", range(image.first_layer, image.layers), image.first_layer),
            *_block_names(MSCLIP_TEXT_PREFIX, "text.", range(text.layers), 0),
            *(_branch_names(image) if image.branch is not None else ()),
        ]
    )


def _weight_and_bias(theirs: str, ours: str) -> _NamePairs:
    for leaf in ("weight", "bias"):
        yield f"{theirs}.{leaf}", f"{ours}.{leaf}"


def _conv_norm(conv: str, norm: str, ours: str) -> _NamePairs:
    yield f"{conv}.weight", f"{ours}.conv.weight"
    for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield f"{norm}.{leaf}", f"{ours}.norm.{leaf}"


def _block_names(theirs: str, ours: str, layers: range, first: int) -> _NamePairs:
    for layer in layers:
        block, native = f"{theirs}resblocks.{layer}", f"{ours}blocks.{layer - first}"
        yield f"{block}.attn.in_proj_weight", f"{native}.attn.qkv.weight"
        yield f"{block}.attn.in_proj_bias", f"{native}.attn.qkv.bias"
        yield from _weight_and_bias(f"{block}.attn.out_proj", f"{native}.attn.proj")
        yield from _weight_and_bias(f"{block}.mlp.c_fc", f"{native}.mlp.fc1")
        yield from _weight_and_bias(f"{block}.mlp.c_proj", f"{native}.mlp.fc2")
        yield from _weight_and_bias(f"{block}.ln_1", f"{native}.norm1")
        yield from _weight_and_bias(f"{block}.ln_2", f"{native}.norm2")


def _patch_names() -> _NamePairs:
    yield "visual.conv1.weight", "image.patch_embed.proj.weight"


def _stem_names() -> _NamePairs:
    stem, ours = f"{MSCLIP_IMAGE_PREFIX}resblocks.0", "image.patch_embed"
    yield from _conv_norm(f"{stem}.conv1", f"{stem}.bn1", f"{ours}.first")
    for number in range(4):
        stage, native = f"{stem}.resnet_stage.conv_{number}", f"{ours}.stages.{number}"
        yield from _conv_norm(f"{stage}.conv1", f"{stage}.bn1", f"{native}.main")
        yield from _conv_norm(f"{stage}.downsample.0", f"{stage}.downsample.1", f"{native}.shortcut")
    yield f"{stem}.last_conv.weight", f"{ours}.last.weight"


def _branch_names(image: ImageTransformerSettings) -> _NamePairs:
    assert image.branch is not None
    branch, ours = f"{MSCLIP_IMAGE_PREFIX}parallel_branch_v", "image.parallel"
    for number, layer in enumerate(image.branch.before):
        if number == 0:
            yield from _conv_norm(f"{branch}.0.conv", f"{branch}.0.bn", f"{ours}.stages.0.main")
        else:
            stage, native = f"{branch}.{number}.resnet_stage.conv_0", f"{ours}.stages.{number}"
            for at, part in enumerate(("reduce", "spatial", "expand"), 1):
                yield from _conv_norm(f"{stage}.conv{at}", f"{stage}.bn{at}", f"{native}.{part}")
            yield from _conv_norm(f"{stage}.residual_conv", f"{stage}.residual_bn", f"{native}.shortcut")
        adapter = f"{MSCLIP_IMAGE_PREFIX}parallel_lateral_adapter.{number}"
        lateral = f"{ours}.laterals.{layer - image.first_layer}"
        yield from _conv_norm(
            f"{adapter}.top2bottom_dw_conv.conv", f"{adapter}.top2bottom_dw_conv.bn", f"{lateral}.top"
        )
        yield f"{adapter}.top2bottom_pw_conv.conv.weight", f"{lateral}.widen.weight"
        yield from _conv_norm(f"{adapter}.bottom_dw_conv.conv", f"{adapter}.bottom_dw_conv.bn", f"{lateral}.bottom")
        yield from _weight_and_bias(f"{adapter}.ln_adapt", f"{lateral}.norm")
