"""A run as an encoder of mteb, which runs the tasks of MTEB and MIEB on it: ``clasp.as_mteb(RUN)``.

Input: a run. Output: ``MtebEncoder``, which satisfies the ``EncoderProtocol`` of mteb 2 (``encode`` of batches with
``text`` or ``image``, ``similarity``, ``similarity_pairwise``, ``mteb_model_meta``). Note: embeddings are unit length;
an input that has an image and a text is the sum of both embeddings, as in mteb's own CLIP models. Prompts of mteb are
not used: the run's tokenizer adds the prefix of its recipe. mteb is imported for ``mteb_model_meta`` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clasp.config.build import load
from clasp.models.dual_encoder import DualEncoder
from clasp.models.inference import EmbeddingModel
from clasp.types import UserError


class MtebEncoder:
    """The model of a run under the method names of mteb's ``EncoderProtocol``."""

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **kwargs: Any):
        """``model_name``: the run, as ``clasp.load`` takes it. ``revision`` is what results are filed under; by default
        the first 16 digits of the model's fingerprint. Further arguments of mteb are not used."""
        self.name, self.model = model_name, load(model_name, device=device or "cpu")
        self.revision = revision or self.model.encoder.fingerprint[:16]

    def encode(self, inputs: Iterable[Mapping[str, Sequence[Any]]], **kwargs: Any) -> Float[Tensor, "n E"]:
        """Batches of texts, images or both to embeddings; task, split, prompt type and batch size change nothing.

        Raises ``UserError`` for batches with neither.
        """
        rows = [self._encode_batch(batch) for batch in inputs]
        if not rows:
            raise UserError("encode: mteb gave no batch")
        return torch.cat(rows)

    def _encode_batch(self, batch: Mapping[str, Sequence[Any]]) -> Float[Tensor, "B E"]:
        sides: list[Tensor] = []
        if "text" in batch:
            sides.append(self.model.encode_text(list(batch["text"])))
        if "image" in batch:
            sides.append(self.model.encode_image(list(batch["image"])))
        if not sides:
            raise UserError(f"encode: the inputs are {', '.join(batch) or 'nothing'}; {self.name} reads text and image")
        return torch.stack(sides).sum(dim=0)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, "n m"]:
        """Cosine similarity of all with all."""
        return _unit_rows(embeddings1) @ _unit_rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, " n"]:
        """Cosine similarity row by row."""
        return (_unit_rows(embeddings1) * _unit_rows(embeddings2)).sum(dim=1)

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's ``ModelMeta``: name, revision, parameters, width. Raises ``UserError`` without mteb."""
        try:
            meta = import_module("mteb.models.model_meta").ModelMeta
        except ModuleNotFoundError as error:
            raise UserError(f"mteb cannot be imported ({error}); type: pip install mteb") from None
        return meta(
            loader=None,
            name=f"clasp/{Path(self.name).name}",
            revision=self.revision,
            release_date=None,
            languages=None,
            n_parameters=_parameter_count(self.model),
            memory_usage_mb=None,
            max_tokens=self.model.tokenizer.max_tokens,
            embed_dim=self.model.encode_text(["a"]).shape[1],
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
            modalities=["image", "text"],
        )


def as_mteb(run: str | Path, *, device: str = "cpu") -> MtebEncoder:
    """The model of a run as an encoder of mteb, in evaluation mode. Raises ``UserError``."""
    return MtebEncoder(str(run), device=device)


def _unit_rows(embeddings: Any) -> Float[Tensor, "n E"]:
    """A row, rows, or an array of rows, made unit length."""
    rows = torch.as_tensor(embeddings, dtype=torch.float32)
    return F.normalize(rows[None] if rows.ndim == 1 else rows, dim=1)


def _parameter_count(model: EmbeddingModel) -> int:
    assert isinstance(model.encoder, DualEncoder)
    return model.encoder.parameter_counts()["model"].total
