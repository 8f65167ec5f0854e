"""``clasp export RUN --to sentence-transformers``: a folder for ``SentenceTransformer(path)``.

Input: a run. Output: where the towers fold (see ``merged_towers``) and are pooled by class token, mean or last token
below linear heads, a ``Router`` with a route for each modality (transformer, pooling, dense layer) and a normalisation:
nothing in it is ours. Image files are then resized by the processor of ``transformers``, which rounds in other places;
the difference on real images is measured and printed. Any other run is written as one module of clasp
(``clasp.convert.sentence_transformers_module``), which needs clasp and ``trust_remote_code=True``; the report gives the
reason.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn

from clasp.convert.exporters.hub_folder import copy_run
from clasp.convert.exporters.job import CheckInputs, ExportJob, ExportReport
from clasp.convert.exporters.merged_towers import hidden_states, merge_inputs, pool_of, save_merged_tower
from clasp.data.caption_ids import TokenizerSettings
from clasp.data.decoding import open_image
from clasp.models.dual_encoder import DualEncoder
from clasp.models.heads import ProjectionHead
from clasp.models.pooling import POOLING_FUNCTIONS
from clasp.types import Pixels, Tokens, UserError

_MODULES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
}
_POOLINGS = {"cls": "cls", "mean": "mean", "last": "lasttoken", "eos": "lasttoken"}
_LIMIT = 1e-5
_CHECKED = 16

Side = Literal["image", "text"]


class _Affine(NamedTuple):
    """A linear head with its standardisation folded in."""

    weight: Float[Tensor, "E D"]
    bias: Float[Tensor, " E"]


def export_sentence_transformers(job: ExportJob, out: Path) -> ExportReport:
    """Write the folder, in modules of sentence-transformers where these express the run."""
    native = out / "native"
    try:
        report = _export_router(job, native)
    except UserError as error:
        shutil.rmtree(native, ignore_errors=True)
        return _export_module(job, out, str(error).partition("; use --to")[0])
    for entry in native.iterdir():
        entry.rename(out / entry.name)
    native.rmdir()
    return report


def _export_module(job: ExportJob, out: Path, reason: str) -> ExportReport:
    """The run itself, below the name of the module that loads it."""
    copy_run(job, out)
    module = {"idx": 0, "name": "0", "path": "", "type": "clasp.convert.sentence_transformers_module.RunEncoder"}
    _write_json(out / "modules.json", [module])
    _write_settings(out)
    loading = "needs clasp and SentenceTransformer(OUT, trust_remote_code=True)"
    (out / "README.md").write_text(_readme(job, ", trust_remote_code=True"), encoding="utf-8")
    lines = [f"not in modules of sentence-transformers: {reason}", f"written as a module of clasp, which {loading}"]
    return ExportReport(lines, {"module": module["type"], "reason": reason})


def _export_router(job: ExportJob, out: Path) -> ExportReport:
    """Raises ``UserError`` where the modules do not express the run."""
    encoder = job.encoder
    affine: dict[Side, _Affine] = {side: _affine(job, side) for side in ("image", "text")}
    _require_plain_tokenizer(job)
    checked = job.check_inputs(_CHECKED)
    inputs = merge_inputs(job, checked)
    with torch.inference_mode():
        wanted = {side: _embed(encoder, given).clone() for side, given in inputs.items()}
    structure, lines, facts = {}, [], {}
    for side, given in inputs.items():
        pool, names = pool_of(job, side), [f"{side}_{number}_{kind}" for number, kind in enumerate(_MODULES)]
        merged = save_merged_tower(job, side, given, out / names[0])
        mask = given.mask if isinstance(given, Tokens) else None
        difference = (_compose(merged.states, mask, pool, affine[side]) - wanted[side]).abs().max().item()
        if not difference <= _LIMIT:
            raise UserError(
                f"{side}.pool = {pool!r} of a {type(merged.net).__name__} is not what "
                f"sentence-transformers pools (embeddings differ by {difference:.1e}); use --to onnx or --to hub"
            )
        _write_modules(job, affine[side], pool, [out / name for name in names])
        structure[side] = names
        facts[f"{side}_difference"] = difference
        lines.append(f"{side}: embeddings differ by {difference:.1e} from the run's")
        if side == "image":
            cosine = _file_cosine(merged.net, out / names[0], checked, (pool, affine["image"]), wanted["image"])
            facts["file_cosine"] = cosine
            lines.append(f"image files, resized by transformers: cosine with the run's embedding at least {cosine:.5f}")
    _write_router(out, structure)
    (out / "README.md").write_text(_readme(job), encoding="utf-8")
    return ExportReport(lines, facts)


def _embed(encoder: DualEncoder, given: Pixels | Tokens) -> Float[Tensor, "B E"]:
    return encoder.embed_image(given) if isinstance(given, Pixels) else encoder.embed_text(given)


def _affine(job: ExportJob, side: Side) -> _Affine:
    """Raises ``UserError`` for a head that is no linear map, and for pooling that no module expresses."""
    head: ProjectionHead = job.encoder.image_head if side == "image" else job.encoder.text_head
    tower = job.encoder.image if side == "image" else job.encoder.text
    pool = pool_of(job, side)
    if pool not in _POOLINGS or tower.extra_layers:
        layers = f" and extra_layers = {list(tower.extra_layers)}" if tower.extra_layers else ""
        raise UserError(
            f"--to sentence-transformers pools by {', '.join(_POOLINGS)} of the last layer; here {side}.pool = {pool!r}"
            f"{layers}; use --to onnx or --to hub"
        )
    standardize = head.standardize
    if standardize is not None and (standardize.power != 1 or standardize.probabilities is not None):
        raise UserError(
            "--to sentence-transformers has linear heads only, and head.power or head.class_probabilities is not "
            "linear; use --to onnx or --to hub"
        )
    if isinstance(head.map, nn.Identity):
        weight, bias = torch.eye(tower.width), torch.zeros(tower.width)
    elif isinstance(head.map, nn.Linear):
        weight = head.map.weight.detach()
        bias = torch.zeros(len(weight)) if head.map.bias is None else head.map.bias.detach()
    else:
        kind = job.recipe.head.kind
        raise UserError(
            f"--to sentence-transformers has linear heads only; here head.kind = {kind!r}; use --to onnx or --to hub"
        )
    if standardize is None:
        return _Affine(weight.clone(), bias.clone())
    scale, shift = standardize.scale.detach(), standardize.shift.detach()
    return _Affine(weight * scale, bias + weight @ shift)


def _require_plain_tokenizer(job: ExportJob) -> None:
    """Raises ``UserError`` for settings of captions that a tokenizer of ``transformers`` does not have."""
    settings, plain = job.model.tokenizer.settings, TokenizerSettings()
    for name in ("clean", "template", "truncation", "padding"):
        given, usual = (dict(vars(each))[name] for each in (settings, plain))
        if given != usual:
            raise UserError(
                f"--to sentence-transformers tokenises with text.{name} = {usual!r}; here {given!r}; use --to onnx or "
                "--to hub"
            )


def _compose(
    states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None, pool: str, affine: _Affine
) -> Float[Tensor, "B E"]:
    """What the written modules compute: pooling over all real tokens, dense layer, normalisation."""
    real = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask
    return F.normalize(F.linear(POOLING_FUNCTIONS[pool](states, real, 0), *affine), dim=-1)


def _file_cosine(
    net: Any,
    folder: Path,
    checked: CheckInputs,
    head: tuple[str, _Affine],
    wanted: Float[Tensor, "B E"],
) -> float:
    """The least cosine between an image's embedding and the run's, where ``transformers`` resizes it."""
    from transformers import AutoImageProcessor

    processor, least = AutoImageProcessor.from_pretrained(folder), 1.0
    for image, embedding in zip(checked.images, wanted, strict=True):
        with open_image(image) as picture:
            pixels = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        least = min(least, (_compose(hidden_states(net, Pixels(pixels)), None, *head)[0] @ embedding).item())
    return least


# --- files -----------------------------------------------------------------------------------------------------------


def _write_modules(job: ExportJob, affine: _Affine, pool: str, folders: list[Path]) -> None:
    transformer, pooling, dense = folders
    side = transformer.name.partition("_")[0]
    settings: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {side: {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    }
    if side == "text":
        settings |= {"max_seq_length": job.model.tokenizer.max_tokens, "do_lower_case": False}
    _write_json(transformer / "sentence_bert_config.json", settings)
    width, features = affine.weight.shape[1], affine.weight.shape[0]
    _write_json(
        pooling / "config.json",
        {"embedding_dimension": width, "pooling_mode": _POOLINGS[pool], "include_prompt": True},
    )
    activation = "torch.nn.modules.linear.Identity"
    _write_json(
        dense / "config.json",
        {"in_features": width, "out_features": features, "bias": True, "activation_function": activation},
    )
    tensors = {"linear.weight": affine.weight.contiguous(), "linear.bias": affine.bias.contiguous()}
    save_file(tensors, dense / "model.safetensors")


def _write_router(out: Path, structure: Mapping[Side, list[str]]) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Normalize",
            "type": "sentence_transformers.base.modules.normalize.Normalize",
        },
    ]
    _write_json(out / "modules.json", modules)
    types = {name: kind for names in structure.values() for name, kind in zip(names, _MODULES.values(), strict=True)}
    routes = {str((None, side)): side for side in structure}
    parameters = {"default_route": "text", "allow_empty_key": True, "route_mappings": routes}
    _write_json(out / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
    _write_json(out / "1_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
    _write_settings(out)


def _write_settings(out: Path) -> None:
    settings = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    _write_json(out / "config_sentence_transformers.json", {**settings, "default_prompt_name": None})


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _readme(job: ExportJob, arguments: str = "") -> str:
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- clasp
---

# {job.run.name}

An image–text model made with clasp: `{job.encoder.image.name}` and `{job.encoder.text.name}` in one embedding space.

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH"{arguments})
model.similarity(model.encode([Image.open("a.jpg")]), model.encode(["a caption"]))
```

The text prefix, if any, is part of the tokenizer: no prompt is needed. The two towers keep their own licences.
"""
