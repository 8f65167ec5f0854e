"""Module paths of the parts of known model families: one row a family, keyed by class name.

Data only: ``FamilyLayout`` rows of dotted paths. Note: another library may have a class of the same name;
``clasp.models.structure`` uses a row only where its blocks exist in the net.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class FamilyLayout:
    """Module paths of one family's parts. Paths are dotted; ``*`` stands for one index.

    ``branch_inputs`` and ``branch_outputs`` name, for each residual branch of a block, the module whose input is the
    branch's input and the module whose output is the branch's output (before the residual sum).
    """

    blocks: str
    attention: str | None
    mlp: tuple[str, ...]
    branch_inputs: tuple[str, ...]
    branch_outputs: tuple[str, ...]
    tail: tuple[str, ...] = ()
    """modules after the last block (the final norm); trained together with the last blocks"""
    pooled_norm: str | None = None
    """a norm that is applied to the pooled vector, not to the hidden states"""
    unused: tuple[str, ...] = ()
    """parameters and modules that never take part in encoding; dropped when a tower is built"""
    channels_first: bool = False
    """branches compute on feature maps ``[B D height width]``"""
    laterals: str | None = None
    """modules that add a parallel branch to the hidden states; ``*`` is the index of the block that follows"""


def _vit(**changes) -> FamilyLayout:
    return FamilyLayout(
        blocks="layers.*",
        attention="attention",
        mlp=("mlp",),
        branch_inputs=("layernorm_before", "layernorm_after"),
        branch_outputs=("attention.o_proj", "mlp.fc2"),
        **{"tail": ("layernorm",), "unused": ("pooler",), **changes},
    )


def _dino(blocks: str, norm: str) -> FamilyLayout:
    return FamilyLayout(
        blocks=blocks,
        attention="attention",
        mlp=("mlp",),
        branch_inputs=("norm1", "norm2"),
        branch_outputs=("layer_scale1", "layer_scale2"),
        tail=(norm,),
        unused=("embeddings.mask_token",),
    )


def _clip(tail: str, **changes) -> FamilyLayout:
    return FamilyLayout(
        blocks="encoder.layers.*",
        attention="self_attn",
        mlp=("mlp",),
        branch_inputs=("layer_norm1", "layer_norm2"),
        branch_outputs=("self_attn.out_proj", "mlp.fc2"),
        tail=(tail,),
        **changes,
    )


BERT_LAYOUT = FamilyLayout(
    blocks="encoder.layer.*",
    attention="attention",
    mlp=("intermediate", "output"),
    branch_inputs=("attention.self", "intermediate"),
    branch_outputs=("attention.output.dropout", "output.dropout"),
    unused=("pooler",),
)
_LLAMA = FamilyLayout(
    blocks="layers.*",
    attention="self_attn",
    mlp=("mlp",),
    branch_inputs=("input_layernorm", "post_attention_layernorm"),
    branch_outputs=("self_attn.o_proj", "mlp.down_proj"),
    tail=("norm",),
)
_T5 = FamilyLayout(
    blocks="encoder.block.*",
    attention="layer.0.SelfAttention",
    mlp=("layer.1.DenseReluDense",),
    branch_inputs=("layer.0.layer_norm", "layer.1.layer_norm"),
    branch_outputs=("layer.0.dropout", "layer.1.dropout"),
    tail=("encoder.final_layer_norm",),
)
_TIMM_VIT = FamilyLayout(
    blocks="blocks.*",
    attention="attn",
    mlp=("mlp",),
    branch_inputs=("norm1", "norm2"),
    branch_outputs=("attn.proj", "mlp.fc2"),
    tail=("norm",),
    pooled_norm="fc_norm",
    unused=("head",),
)
_NATIVE_VIT = replace(_TIMM_VIT, laterals="parallel.laterals.*")  # native encoders have timm's names

# Longformer's projections for global attention; no token of a caption has global attention
_GLOBAL_ATTENTION = tuple(f"encoder.layer.*.attention.self.{name}_global" for name in ("query", "key", "value"))

FAMILY_LAYOUTS: dict[str, FamilyLayout] = {
    "ViTModel": _vit(),
    "DeiTModel": _vit(),
    "BeitModel": _vit(unused=(), pooled_norm="pooler.layernorm"),
    "Dinov2Model": _dino("encoder.layer.*", "layernorm"),
    "Dinov2Encoder": _dino("encoder.layer.*", "layernorm"),  # native, under the same names
    "DINOv3ViTModel": _dino("model.layer.*", "norm"),
    "CLIPVisionModel": _clip("post_layernorm", pooled_norm="post_layernorm"),
    "CLIPTextModel": _clip("final_layer_norm"),
    "ChineseCLIPVisionModel": _clip("post_layernorm", pooled_norm="post_layernorm"),
    "ChineseCLIPTextModel": BERT_LAYOUT,
    "MetaClip2VisionModel": _clip("post_layernorm", pooled_norm="post_layernorm"),
    "MetaClip2TextModel": _clip("final_layer_norm"),
    "SiglipVisionModel": _clip("post_layernorm", unused=("head",)),
    "SiglipTextModel": _clip("final_layer_norm", unused=("head",)),
    "Siglip2TextModel": _clip("final_layer_norm", unused=("head",)),
    "MLCDVisionModel": _clip("post_layernorm", pooled_norm="post_layernorm"),
    "ConvNextModel": FamilyLayout(
        blocks="encoder.stages.*.layers.*",
        attention=None,
        mlp=("pwconv1", "pwconv2"),
        branch_inputs=("dwconv",),
        branch_outputs=("pwconv2",),
        pooled_norm="layernorm",
    ),
    "ConvNextV2Model": FamilyLayout(
        blocks="encoder.stages.*.layers.*",
        attention=None,
        mlp=("pwconv1", "pwconv2"),
        branch_inputs=("dwconv",),
        branch_outputs=("pwconv2",),
        pooled_norm="layernorm",
    ),
    "HieraModel": FamilyLayout(
        blocks="encoder.stages.*.layers.*",
        attention="attn",
        mlp=("mlp",),
        branch_inputs=("layernorm_before", "layernorm_after"),
        branch_outputs=("attn", "mlp"),
        pooled_norm="pooler.layernorm",
    ),
    "EfficientNetModel": FamilyLayout(
        blocks="encoder.blocks.*",
        attention=None,
        mlp=(),
        branch_inputs=(),
        branch_outputs=("projection.project_bn",),
        tail=("encoder.top_conv", "encoder.top_bn"),
        channels_first=True,
    ),
    "EfficientNet": FamilyLayout(  # efficientnet_lite_pytorch
        blocks="_blocks.*",
        attention=None,
        mlp=(),
        branch_inputs=(),
        branch_outputs=("_bn2",),
        tail=("_conv_head", "_bn1"),
        unused=("_fc",),
        channels_first=True,
    ),
    "VisionTransformer": _NATIVE_VIT,  # timm's, and the native DeiT
    "ImageTransformer": _NATIVE_VIT,
    "TextTransformer": _NATIVE_VIT,
    "Eva": _TIMM_VIT,
    "Beit": _TIMM_VIT,
    "ConvNeXt": FamilyLayout(  # timm's
        blocks="stages.*.blocks.*",
        attention=None,
        mlp=("mlp",),
        branch_inputs=("conv_dw",),
        branch_outputs=("mlp",),
        pooled_norm="head.norm",
    ),
    "BertModel": BERT_LAYOUT,
    "BertEncoder": BERT_LAYOUT,  # native, under the same names
    "RobertaModel": BERT_LAYOUT,
    "XLMRobertaModel": BERT_LAYOUT,
    "ElectraModel": BERT_LAYOUT,
    "CamembertModel": BERT_LAYOUT,
    "BigBirdModel": BERT_LAYOUT,
    "LongformerModel": replace(BERT_LAYOUT, unused=("pooler", *_GLOBAL_ATTENTION)),
    "NomicBertModel": FamilyLayout(
        blocks="layers.*",
        attention="self_attn",
        mlp=("mlp",),
        branch_inputs=("self_attn", "mlp"),
        branch_outputs=("post_attention_dropout", "post_mlp_dropout"),
    ),
    "MPNetModel": FamilyLayout(
        blocks="encoder.layer.*",
        attention="attention",
        mlp=("intermediate", "output"),
        branch_inputs=("attention.attn", "intermediate"),
        branch_outputs=("attention.attn.o", "output.dropout"),
        unused=("pooler",),
    ),
    "DistilBertModel": FamilyLayout(
        blocks="transformer.layer.*",
        attention="attention",
        mlp=("ffn",),
        branch_inputs=("attention", "ffn"),
        branch_outputs=("attention.out_lin", "ffn"),
    ),
    "ModernBertModel": FamilyLayout(
        blocks="layers.*",
        attention="attn",
        mlp=("mlp",),
        branch_inputs=("attn_norm", "mlp_norm"),
        branch_outputs=("attn.Wo", "mlp.Wo"),
        tail=("final_norm",),
    ),
    "T5EncoderModel": _T5,
    "MT5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "LlamaModel": _LLAMA,
    "MistralModel": _LLAMA,
    "Qwen2Model": _LLAMA,
    "Qwen3Model": _LLAMA,
    "GemmaModel": _LLAMA,
}
