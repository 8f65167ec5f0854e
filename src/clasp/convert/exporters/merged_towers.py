"""``clasp export RUN --to merged``: both towers as plain folders of ``transformers``, tuning folded into the weights.

Input: a run. Output: ``image/`` and ``text/``, which ``AutoModel.from_pretrained`` loads, ``heads.safetensors`` and
``clasp_merged.json`` (pooling, head, preprocessing, logit scale). Note: low-rank updates are added to the weights;
norms, biases and fully trained parts are weights anyway. Adapters, prompts and appended parts have no place in such a
folder and are refused, as is a tower that ``transformers`` has no class for. The folder is loaded back and its hidden
states are compared with those of the run; a difference above 1e-5, relative, fails.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from clasp.convert.exporters.job import CheckInputs, ExportJob, ExportReport
from clasp.data.images import ImageTransform
from clasp.models.partial_forward import as_tokens
from clasp.models.probe import relative_difference
from clasp.models.structure import is_transformers_model
from clasp.models.tower import Tower
from clasp.models.transformer.bert import BertEncoder
from clasp.models.transformer.dinov2 import Dinov2Encoder
from clasp.models.tuning.peft_methods import fold_wrapped_layers
from clasp.types import Pixels, Tokens, UserError

MERGED_FILE, HEADS_FILE = "clasp_merged.json", "heads.safetensors"
_LIMIT = 1e-5  # of hidden states, relative
_CHECKED = 4
_RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers


def export_merged(job: ExportJob, out: Path) -> ExportReport:
    """Write both towers, the heads and the settings. Raises ``UserError`` where the tuning does not fold."""
    encoder, facts, inputs = job.encoder, {}, merge_inputs(job, job.check_inputs(_CHECKED))
    for side in inputs:
        merged = save_merged_tower(job, side, inputs[side], out / side)
        facts[f"{side}_difference"] = merged.difference
    heads = {
        f"{side}.{name}": tensor.detach().clone().contiguous()
        for side, head in (("image", encoder.image_head), ("text", encoder.text_head))
        for name, tensor in head.state_dict().items()
    }
    save_file(heads, out / HEADS_FILE)
    scale, bias = encoder.scale_and_bias()
    settings = {
        "pool": {"image": pool_of(job, "image"), "text": pool_of(job, "text")},
        "extra_layers": {"image": list(encoder.image.extra_layers), "text": list(encoder.text.extra_layers)},
        "head": job.recipe.head.model_dump(mode="json"),
        "logit_scale": scale.item(),
        "logit_bias": None if bias is None else bias.item(),
        "transform": job.model.transform.to_dict(),
    }
    (out / MERGED_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (out / "README.md").write_text(_readme(job), encoding="utf-8")
    lines = [
        f"{side}: hidden states of the loaded folder differ by {facts[f'{side}_difference']:.1e} (relative)"
        for side in ("image", "text")
    ]
    return ExportReport(lines, facts)


def pool_of(job: ExportJob, side: Literal["image", "text"]) -> str:
    """The pooling of a tower."""
    settings, tower = (job.recipe.image, job.encoder.image) if side == "image" else (job.recipe.text, job.encoder.text)
    return settings.pool or tower.authors_pool


class MergedTower(NamedTuple):
    """A tower as loaded back from its folder, its hidden states of the checked inputs, and their relative difference
    from the run's."""

    net: Any
    states: Float[Tensor, "B N D"]
    difference: float


def save_merged_tower(
    job: ExportJob, side: Literal["image", "text"], inputs: Pixels | Tokens, folder: Path
) -> MergedTower:
    """Write a tower with its preprocessing and load it back. Changes the model of the job. Raises ``UserError``."""
    tower = job.encoder.image if side == "image" else job.encoder.text
    with torch.inference_mode():
        wanted = tower(inputs).clone()
    fold_wrapped_layers(tower.net)
    net = _plain_net(tower)
    with _quiet():
        net.save_pretrained(folder)
        if isinstance(inputs, Pixels):
            _save_image_processor(job.model.transform, folder)
        else:
            _save_tokenizer(job, folder)
        loaded: Any = type(net).from_pretrained(folder).eval()
    states = hidden_states(loaded, inputs)
    difference = relative_difference(states, wanted)
    if not difference <= _LIMIT:
        raise UserError(
            f"the {side} tower {tower.name} is not the same as a plain {type(net).__name__}: hidden states differ by "
            f"{difference:.1e}; use --to onnx or --to hub, which keep everything"
        )
    return MergedTower(loaded, states, difference)


def merge_inputs(job: ExportJob, checked: CheckInputs) -> dict[Literal["image", "text"], Pixels | Tokens]:
    """The inputs of both towers."""
    pixels = torch.stack([job.model.transform(image) for image in checked.images])
    return {"image": Pixels(pixels), "text": job.model.tokenizer(checked.captions)}


def hidden_states(net: Any, inputs: Pixels | Tokens) -> Float[Tensor, "B N D"]:
    """The last hidden states of a model of ``transformers``."""
    with torch.inference_mode():
        if isinstance(inputs, Pixels):
            return as_tokens(net(pixel_values=inputs.values).last_hidden_state)
        return net(input_ids=inputs.ids, attention_mask=inputs.mask.long()).last_hidden_state


def _plain_net(tower: Tower) -> Any:
    """The net as a model of ``transformers`` without added parts. Raises ``UserError``."""
    net: Any = tower.net
    if isinstance(net, BertEncoder | Dinov2Encoder):
        plain = _as_transformers(net)
        _require_no_more(tower, net, plain)
        plain.load_state_dict(net.state_dict(), assign=True)
        return plain.eval()
    if not is_transformers_model(net):
        raise UserError(
            f"{tower.name} is a {type(net).__name__}, which transformers has no class for; use --to onnx or --to hub"
        )
    with torch.device("meta"):
        plain = type(net)(net.config)
    _require_no_more(tower, net, plain)
    return net


def _as_transformers(net: BertEncoder | Dinov2Encoder) -> Any:
    """The model of ``transformers`` whose parameters a native net has under the same names."""
    from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

    settings = {**asdict(net.settings), "num_hidden_layers": len(net.encoder.layer)}
    if isinstance(net, BertEncoder):
        return BertModel(BertConfig(**settings, architectures=["BertModel"]), add_pooling_layer=False)
    return Dinov2Model(Dinov2Config(**settings, architectures=["Dinov2Model"], use_mask_token=False))


def _require_no_more(tower: Tower, net: nn.Module, plain: nn.Module) -> None:
    more = sorted(net.state_dict().keys() - plain.state_dict().keys())
    if more:
        raise UserError(
            f"{tower.name} is tuned with {', '.join(spec.method for spec in tower.tunings)}, which does not fold into "
            f"weights ({more[0]} has no place in a {type(plain).__name__}); use --to onnx or --to hub"
        )


# --- preprocessing ---------------------------------------------------------------------------------------------------


def _save_image_processor(transform: ImageTransform, folder: Path) -> None:
    """The nearest settings of a ``transformers`` image processor; its resampling differs from ours by rounding to 8
    bits. ``pad`` has no counterpart: the whole image is squashed there."""
    side = {"height": transform.size, "width": transform.size}
    shortest = {"shortest_edge": math.floor(transform.size / transform.crop_fraction)}
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": shortest if transform.resize == "crop" else side,
        "do_center_crop": transform.resize == "crop",
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": _RESAMPLE[transform.interpolation],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _save_tokenizer(job: ExportJob, folder: Path) -> None:
    import tokenizers

    settings = job.model.tokenizer.settings
    job.model.tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    if settings.prefix:  # so that it is put before every text by whoever tokenises
        before = tokenizers.normalizers.Prepend(settings.prefix)
        parts = [before] if backend.normalizer is None else [before, backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    backend.save(str(folder / "tokenizer.json"))
    (folder / "clasp_tokenizer.json").unlink()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings.max_tokens,
        "pad_token": backend.id_to_token(settings.pad_id),
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and without the note that an unused pooling layer is not in the file."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _readme(job: ExportJob) -> str:
    return f"""# {job.run.name}, merged

`image/` and `text/` are plain folders of transformers, with what clasp trained in them
(`{job.encoder.image.name}`, `{job.encoder.text.name}`):

```python
from transformers import AutoModel

image, text = AutoModel.from_pretrained("image"), AutoModel.from_pretrained("text")
```

`{HEADS_FILE}` has the projection heads, `{MERGED_FILE}` the pooling, the image transform and the logit scale. A pooling
layer that the towers do not use is not in the files; transformers initialises it at random. The text prefix, if any, is
part of the tokenizer. The two towers keep their own licences.
"""
