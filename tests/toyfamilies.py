"""More families of ``transformers`` as tiny configurations, whether or not a tower can be made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from toysavedtowers import END, save_preprocessor, save_tokenizer

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
_IMAGE = dict(**_SIZES, image_size=32, patch_size=8)
_IDS = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=END)
_TEXT = dict(**_SIZES, **_IDS, max_position_embeddings=64)
_GQA = dict(**_TEXT, num_key_value_heads=1, head_dim=16)
_T5 = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64, pad_token_id=0)
_GPT = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, **_IDS)
_STAGES = dict(depths=[1, 1, 2, 1], hidden_sizes=[8, 12, 16, 24])
_SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4)

IMAGE_FAMILIES: dict[str, dict[str, Any]] = {
    "aimv2_vision_model": _IMAGE,
    "bit": dict(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 2], num_groups=4),
    "clip_vision_model": _IMAGE,
    "convnextv2": dict(**_STAGES, image_size=32),
    "data2vec-vision": _IMAGE,
    "dinov2_with_registers": {k: v for k, v in _IMAGE.items() if k != "intermediate_size"},
    "dinov3_convnext": dict(**_STAGES, image_size=32),
    "focalnet": dict(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 2], focal_levels=[2, 2], focal_windows=[3, 3]
    ),
    "hgnet_v2": {},
    "hiera": dict(
        image_size=[32, 32],
        patch_stride=[4, 4],
        embed_dim=16,
        depths=[1, 2],
        num_heads=[1, 2],
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
        num_query_pool=1,
    ),
    "ijepa": _IMAGE,
    "levit": dict(
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 2],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
    ),
    "mlcd_vision_model": _IMAGE,
    "mobilenet_v1": dict(image_size=32, depth_multiplier=0.25),
    "mobilenet_v2": dict(image_size=32, depth_multiplier=0.25),
    "mobilevit": dict(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32], num_attention_heads=2
    ),
    "mobilevitv2": dict(image_size=64, width_multiplier=0.25),
    "pixio": _IMAGE,
    "poolformer": dict(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1]),
    "pvt": dict(image_size=64, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 2], num_attention_heads=[1, 1, 2, 2]),
    "pvt_v2": dict(image_size=64, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 2], num_attention_heads=[1, 1, 2, 2]),
    "regnet": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=8),
    "resnet": dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2]),
    "segformer": dict(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 2], num_attention_heads=[1, 1, 2, 2]),
    "siglip_vision_model": _IMAGE,
    "siglip2_vision_model": dict(**_SIZES, num_patches=16, patch_size=8),
    "swiftformer": dict(image_size=64, depths=[1, 1, 1, 2], embed_dims=[8, 16, 16, 24]),
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": dict(image_size=[64, 64]),
    "vit_mae": _IMAGE,
    "vit_msn": _IMAGE,
    "vitdet": dict(**_SIZES, image_size=32, patch_size=8, pretrain_image_size=32),
    "yolos": dict(**{**_IMAGE, "image_size": [32, 32]}, num_detection_tokens=4),
}
TEXT_FAMILIES: dict[str, dict[str, Any]] = {
    "albert": dict(**_TEXT, embedding_size=16),
    "big_bird": _TEXT,
    "bloom": dict(hidden_size=32, n_layer=2, n_head=2, **_IDS),
    "camembert": {**_TEXT, "pad_token_id": 0},
    "canine": {**_TEXT, "num_hash_buckets": 64},
    "clip_text_model": _TEXT,
    "codegen": dict(**_GPT, rotary_dim=8),
    "cohere": _GQA,
    "convbert": _TEXT,
    "ctrl": dict(n_embd=32, n_layer=2, n_head=2, dff=64, n_positions=64, vocab_size=64),
    "deberta": _TEXT,
    "deberta-v2": _TEXT,
    "distilbert": dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=64, pad_token_id=0),
    "electra": dict(**_TEXT, embedding_size=16),
    "ernie": _TEXT,
    "eurobert": _GQA,
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **_IDS),
    "flaubert": dict(emb_dim=32, n_layers=2, n_heads=2, n_words=64, max_position_embeddings=64, pad_index=0),
    "fnet": _TEXT,
    "gemma": _GQA,
    "gemma2": _GQA,
    "gemma3_text": _GQA,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": dict(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        **_IDS,
        max_position_embeddings=64,
    ),
    "gpt_neox": _TEXT,
    "gptj": dict(**_GPT, rotary_dim=8),
    "granite": _GQA,
    "ibert": _TEXT,
    "layoutlm": _TEXT,
    "longformer": dict(**_TEXT, attention_window=[8, 8]),
    "lfm2": dict(**_GQA, layer_types=["conv", "full_attention"]),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=64),
    "mamba2": dict(
        hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=64, num_heads=4, head_dim=16, n_groups=1
    ),
    "markuplm": _TEXT,
    "megatron-bert": _TEXT,
    "mistral": _GQA,
    "mobilebert": dict(**_TEXT, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    "mpt": dict(d_model=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=64),
    "mt5": _T5,
    "nemotron": _GQA,
    "nomic_bert": _TEXT,
    "nystromformer": _TEXT,
    "olmo2": _GQA,
    "openai-gpt": _GPT,
    "opt": {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": _TEXT,
    "phi3": {**_GQA, "original_max_position_embeddings": 64},
    "qwen2": _GQA,
    "reformer": dict(
        attention_head_size=16,
        attn_layers=["local", "lsh"],
        hidden_size=32,
        num_attention_heads=2,
        feed_forward_size=64,
        vocab_size=64,
        axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[16, 16],
        max_position_embeddings=64,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        num_buckets=2,
    ),
    "rembert": dict(**_TEXT, input_embedding_size=16),
    "roberta": _TEXT,
    "roberta-prelayernorm": _TEXT,
    "roc_bert": dict(**_TEXT, pronunciation_vocab_size=8, shape_vocab_size=8),
    "roformer": dict(**_TEXT, embedding_size=32),
    "rwkv": dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64, vocab_size=64),
    "splinter": _TEXT,
    "squeezebert": dict(
        **_TEXT, embedding_size=32, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2
    ),
    "starcoder2": {**_TEXT, "num_key_value_heads": 1},
    "t5": _T5,
    "umt5": _T5,
    "xglm": dict(d_model=32, num_layers=2, attention_heads=2, ffn_dim=64, **_IDS, max_position_embeddings=64),
    "xlm": dict(emb_dim=32, n_layers=2, n_heads=2, n_words=64, max_position_embeddings=64, pad_index=0),
    "xlm-roberta-xl": _TEXT,
    "xlnet": dict(d_model=32, n_layer=2, n_head=2, d_inner=64, vocab_size=64),
    "xmod": {**_TEXT, "languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": _TEXT,
}


def save_family(name: str, folder: Path, **preprocessor: Any) -> Path:
    """Write a tiny tower of a family as a hub would have it."""
    image = name in IMAGE_FAMILIES
    config = hf.AutoConfig.for_model(name, **(IMAGE_FAMILIES if image else TEXT_FAMILIES)[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        halves = {"mt5": hf.MT5EncoderModel, "umt5": hf.UMT5EncoderModel, "t5": hf.T5EncoderModel}
        net = halves[name](config) if name in halves else hf.AutoModel.from_config(config)
        for p in net.parameters():  # no norm, bias or scale is an identity
            p.data += 0.05 * torch.randn_like(p)
    net.save_pretrained(folder)
    if image:
        save_preprocessor(folder, **preprocessor)
    else:
        save_tokenizer(folder, template="<s> $A </s>")
    return folder
