"""``clasp export RUN --to onnx``: both towers with their heads as ONNX graphs, run without torch by ``OnnxModel``.

Input: a run. Output: ``image.onnx``, ``text.onnx``, ``tokenizer/`` and ``clasp_onnx.json`` (preprocessing constants,
logit scale, measured parity), and on request the same graphs with int8 weights. Batch and caption length are dynamic;
so is the image size, unless the graph then differs from torch, as for networks whose padding depends on the size. Note:
the graphs are compared with torch on real inputs of several shapes, and an export that differs by more than 1e-5 fails.
The tracing exporter is used: graphs of torch's newer one failed at image sizes other than the traced one (torch 2.13).
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clasp.convert.exporters.job import CheckInputs, ExportJob, ExportOptions, ExportReport
from clasp.convert.exporters.onnx_int8 import INT8_SCHEME, measure_int8_loss, quantize_graph
from clasp.convert.onnx_model import MANIFEST_FILE, ONNX_FORMAT
from clasp.models.dual_encoder import DualEncoder
from clasp.models.tuning.peft_methods import fold_wrapped_layers
from clasp.types import Pixels, Tokens, UserError

PARITY_LIMIT = 1e-5  # greatest difference of any number of an embedding from torch
_OPSET = 17
_CHECKED = 8  # images and captions of the parity check
_AXES = {
    "pixels": {0: "batch", 2: "height", 3: "width"},
    "ids": {0: "batch", 1: "length"},
    "mask": {0: "batch", 1: "length"},
    "embedding": {0: "batch"},
}


class _ImageGraph(nn.Module):
    """Pixels to embeddings."""

    def __init__(self, encoder: DualEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        return self.encoder.embed_image(Pixels(pixels))


class _TextGraph(nn.Module):
    """Token ids and attention mask to embeddings."""

    def __init__(self, encoder: DualEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        return self.encoder.embed_text(Tokens(ids, mask))


class _Case(NamedTuple):
    """Inputs of one shape, and the embeddings that torch computes from them."""

    inputs: tuple[Tensor, ...]
    wanted: Float[Tensor, "B E"]


def require_onnx_extra(options: ExportOptions) -> None:
    """Raises ``UserError`` where the packages of the extra are missing."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}; install them with: pip install 'clasp-vl[onnx]'")


def export_onnx(job: ExportJob, out: Path) -> ExportReport:
    """Write the graphs and what belongs to them into ``out``. Raises ``UserError`` where a graph is not the model."""
    model, encoder = job.model, job.encoder
    checked = job.check_inputs(_CHECKED)
    pixels, captions = _image_cases(job, checked), _text_cases(job, checked)  # before anything is folded
    fingerprint = model.fingerprint
    folded = [fold_wrapped_layers(tower.net) for tower in (encoder.image, encoder.text)]
    image = _export_image(_ImageGraph(encoder), pixels, out / "image.onnx")
    _trace(_TextGraph(encoder), captions[0].inputs, ("ids", "mask"), _AXES, out / "text.onnx")
    text = _require_parity(encoder.text.name, "text", captions, out / "text.onnx")
    model.tokenizer.save(out / "tokenizer")
    scale, bias = encoder.scale_and_bias()
    manifest: dict[str, Any] = {
        "format": ONNX_FORMAT,
        "towers": {"image": encoder.image.name, "text": encoder.text.name},
        "fingerprint": fingerprint,
        "width": pixels.own[0].wanted.shape[1],
        "logit_scale": scale.item(),
        "logit_bias": None if bias is None else bias.item(),
        "image": {
            "graphs": {"float32": "image.onnx"},
            "input": "pixels [batch, 3, height, width], float32, RGB: (x / 255 - mean) / std",
            "sizes": image.sizes,
            "transform": model.transform.to_dict(),
        },
        "text": {
            "graphs": {"float32": "text.onnx"},
            "input": "ids [batch, length], int64, and mask [batch, length], true on real tokens",
            "tokenizer": "tokenizer/",
        },
        "parity": {"checked_on": checked.name, "image": image.parity, "text": text},
        "folded_layers": sum(len(paths) for paths in folded),
    }
    lines = [_parity_line("image", image.parity), image.note, _parity_line("text", text)]
    if job.options.quantize == "int8":
        for side in ("image", "text"):
            manifest[side]["graphs"]["int8"] = f"{side}.int8.onnx"
            quantize_graph(out / f"{side}.onnx", out / f"{side}.int8.onnx")
        manifest["int8"] = {"scheme": INT8_SCHEME}
        _write_manifest(manifest, out)
        loss = measure_int8_loss(job, out)
        manifest["int8"] |= loss.facts()
        lines += loss.lines()
    _write_manifest(manifest, out)
    (out / "README.md").write_text(_readme(job), encoding="utf-8")
    return ExportReport([*lines, f"parity was measured on {checked.name}"], manifest)


def _write_manifest(manifest: Mapping[str, Any], out: Path) -> None:
    (out / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


# --- cases -----------------------------------------------------------------------------------------------------------


class _ImageCases(NamedTuple):
    """At the model's own image size, and at two others; none where the tower does not take them."""

    own: list[_Case]
    others: list[_Case]


def _image_cases(job: ExportJob, checked: CheckInputs) -> _ImageCases:
    own = [_image_case(job, checked, job.model.transform.size, count) for count in (2, 1, 3)]
    try:
        size = job.model.transform.size
        return _ImageCases(own, [_image_case(job, checked, 3 * size // 2, 2), _image_case(job, checked, 2 * size, 1)])
    except (RuntimeError, ValueError):
        return _ImageCases(own, [])


def _image_case(job: ExportJob, checked: CheckInputs, size: int, count: int) -> _Case:
    transform = replace(job.model.transform, size=size)
    inputs = (torch.stack([transform(image) for image in checked.images[:count]]),)
    return _Case(inputs, _compute(_ImageGraph(job.encoder), inputs))


def _text_cases(job: ExportJob, checked: CheckInputs) -> list[_Case]:
    """Captions of several lengths; the first case, which is traced, has padding."""
    words = sorted(checked.captions, key=len)
    tokenizer, graph = job.model.tokenizer, _TextGraph(job.encoder)
    long = " ".join([*words, *words])
    batches = [[words[0], f"{words[0]} {words[-1]}"], [words[-1]], words[:3], [words[0], long], words]
    inputs = [(tokens.ids, tokens.mask) for tokens in map(tokenizer, batches)]
    return [_Case(each, _compute(graph, each)) for each in inputs]


def _compute(graph: nn.Module, inputs: tuple[Tensor, ...]) -> Float[Tensor, "B E"]:
    with torch.inference_mode():
        return graph(*inputs).clone()


# --- graphs ----------------------------------------------------------------------------------------------------------


class _ImageExport(NamedTuple):
    sizes: str
    parity: list[dict[str, Any]]
    note: str


def _export_image(graph: _ImageGraph, cases: _ImageCases, path: Path) -> _ImageExport:
    """With a dynamic image size where that equals torch, else with the model's own."""
    name, own = graph.encoder.image.name, cases.own[0].inputs[0].shape[-1]
    reason = "the tower does not take another"
    if cases.others:
        _trace(graph, cases.own[0].inputs, ("pixels",), _AXES, path)
        others = _measure(cases.others, path)
        worst = max((row["difference"] for row in others), default=float("inf"))
        if worst <= PARITY_LIMIT:
            parity = [*_require_parity(name, "image", cases.own, path), *others]
            return _ImageExport("any", parity, "image size: dynamic")
        reason = f"at another, the graph differs from torch by {worst:.1e}"
    fixed = {**_AXES, "pixels": {0: "batch"}}
    _trace(graph, cases.own[0].inputs, ("pixels",), fixed, path)
    parity = _require_parity(name, "image", cases.own, path)
    return _ImageExport(str(own), parity, f"image size: {own} pixels only ({reason})")


def _trace(
    graph: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], axes: Mapping[str, dict[int, str]], path: Path
) -> None:
    """Trace ``graph`` into an ONNX file. Raises ``UserError`` for an operator that ONNX does not have."""
    with warnings.catch_warnings(), torch.no_grad(), _without_fused_layers():
        warnings.simplefilter("ignore")  # values that a trace fixes; the parity check finds those that matter
        try:
            torch.onnx.export(
                graph,
                inputs,
                str(path),
                input_names=list(names),
                output_names=["embedding"],
                dynamic_axes={name: axes[name] for name in (*names, "embedding")},
                opset_version=_OPSET,
                dynamo=False,
            )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"{path.stem} tower: torch cannot export it to ONNX ({reason})") from error


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """The inference path of ``nn.TransformerEncoderLayer`` is one operator that ONNX does not have."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _measure(cases: Sequence[_Case], path: Path) -> list[dict[str, Any]]:
    """Shape and greatest difference from torch of each case; infinite where onnxruntime does not run it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names, rows = [each.name for each in session.get_inputs()], []
    for inputs, wanted in cases:
        try:
            feed = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
            difference = float(np.abs(session.run(["embedding"], feed)[0] - wanted.numpy()).max())
        except Exception:  # onnxruntime raises classes of its own that derive from Exception
            difference = float("inf")
        rows.append({"shape": list(inputs[0].shape), "difference": difference})
    return rows


def _require_parity(name: str, side: str, cases: Sequence[_Case], path: Path) -> list[dict[str, Any]]:
    rows = _measure(cases, path)
    for row in rows:
        if not row["difference"] <= PARITY_LIMIT:
            found = (
                f"differs from torch by {row['difference']:.1e} at shape {row['shape']}, more than {PARITY_LIMIT:.0e}"
            )
            if row["difference"] == float("inf"):
                found = f"does not run at shape {row['shape']}"
            raise UserError(f"the ONNX graph of the {side} tower {name} {found}; this tower cannot be exported to ONNX")
    return rows


def _parity_line(side: str, rows: Sequence[Mapping[str, Any]]) -> str:
    worst = max(row["difference"] for row in rows)
    shapes = ", ".join("x".join(map(str, row["shape"])) for row in rows)
    return f"{side}: greatest difference from torch {worst:.1e} (shapes {shapes})"


def _readme(job: ExportJob) -> str:
    return f"""# {job.run.name}, ONNX

An image–text model made with clasp: `{job.encoder.image.name}` and `{job.encoder.text.name}` in one embedding space.

```python
from clasp import OnnxModel  # needs numpy, onnxruntime, tokenizers, Pillow and jaxtyping; not torch

model = OnnxModel(".")
model.similarity(model.encode_image(["a.jpg"]), model.encode_text(["a caption"]))
```

`{MANIFEST_FILE}` has the preprocessing constants, the names of inputs, the logit scale, and the measured difference
from torch. Embeddings have length 1. The two towers keep their own licences.
"""
