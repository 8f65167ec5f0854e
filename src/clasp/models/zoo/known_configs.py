"""Configurations of published towers, so that parameters and FLOPs are counted without a hub: by repository.

Data only. Sizes are those of the ``config.json`` in each repository, written down from model cards and papers; a key
that is left out has the default of its configuration class in ``transformers``. Note: they are read on the meta device
only. A tower with weights is built from the configuration beside its weights.
"""

from __future__ import annotations

from typing import Any

_BERT = {"model_type": "bert", "max_position_embeddings": 512, "type_vocab_size": 2}
_XLM_R = {"model_type": "xlm-roberta", "vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1}
_XLM_R |= {"pad_token_id": 1, "layer_norm_eps": 1e-5}
_DINOV2 = {"model_type": "dinov2", "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6}
_DINOV3 = {"model_type": "dinov3_vit", "image_size": 224, "patch_size": 16, "num_register_tokens": 4, "key_bias": False}


def _transformer(width: int, layers: int, heads: int, hidden: int | None = None) -> dict[str, Any]:
    """The sizes of a transformer; the feed-forward layer is four times as wide where ``hidden`` is left out."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": hidden or 4 * width}


_SMALL, _BASE, _LARGE = _transformer(384, 12, 6), _transformer(768, 12, 12), _transformer(1024, 24, 16)
_CLIP_B32 = {
    "model_type": "clip",
    "projection_dim": 512,
    "vision_config": {**_BASE, "image_size": 224, "patch_size": 32, "projection_dim": 512},
    "text_config": {**_transformer(512, 12, 8), "vocab_size": 49_408, "max_position_embeddings": 77},
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    # text towers of the LilT paper
    **{
        name: {**_BERT, **_transformer(width, layers, heads), "vocab_size": vocabulary}
        for name, width, layers, heads, vocabulary in (
            ("prajjwal1/bert-tiny", 128, 2, 2, 30522),
            ("prajjwal1/bert-small", 512, 4, 8, 30522),
            ("princeton-nlp/unsup-simcse-bert-base-uncased", 768, 12, 12, 30522),
            ("princeton-nlp/unsup-simcse-bert-large-uncased", 1024, 24, 16, 30522),
            ("google-bert/bert-base-multilingual-cased", 768, 12, 12, 119547),
        )
    },
    # image towers of recipes/hub: Oquab et al., TMLR 2024; Siméoni et al., 2025; Dosovitskiy et al., ICLR 2021
    "facebook/dinov2-small": {**_DINOV2, **_SMALL},
    "facebook/dinov2-base": {**_DINOV2, **_BASE},
    "facebook/dinov2-large": {**_DINOV2, **_LARGE},
    "facebook/dinov3-vits16-pretrain-lvd1689m": {**_DINOV3, **_SMALL},
    "facebook/dinov3-vitb16-pretrain-lvd1689m": {**_DINOV3, **_BASE},
    "google/vit-base-patch16-224-in21k": {"model_type": "vit", **_BASE, "image_size": 224, "patch_size": 16},
    "google/siglip2-base-patch16-224": {  # Tschannen et al., 2025: SigLIP's architecture, Gemma's vocabulary
        "model_type": "siglip",
        "vision_config": {**_BASE, "image_size": 224, "patch_size": 16},
        "text_config": {**_BASE, "vocab_size": 256_000, "max_position_embeddings": 64},
    },
    # text towers of recipes/hub: Conneau et al., ACL 2020; Wang et al., 2024 (E5); Chen et al., ACL 2024 (M3)
    "FacebookAI/xlm-roberta-base": {**_XLM_R, **_BASE},
    "intfloat/multilingual-e5-base": {**_XLM_R, **_BASE},
    "BAAI/bge-m3": {**_XLM_R, **_LARGE, "max_position_embeddings": 8194},
    "dbmdz/bert-base-turkish-cased": {**_BERT, **_BASE, "vocab_size": 32_000},
    # dual encoders of recipes/hub: Radford et al., ICML 2021; Cherti et al., CVPR 2023
    "openai/clip-vit-base-patch32": _CLIP_B32,
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": _CLIP_B32,
}
"""keyword arguments of ``transformers.AutoConfig.for_model``, ``model_type`` among them"""
