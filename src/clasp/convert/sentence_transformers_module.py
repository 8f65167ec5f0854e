"""Any run as one module of sentence-transformers, where its own modules cannot express the towers or heads.

Input: a folder written by ``clasp export RUN --to sentence-transformers``. Output: ``sentence_embedding``, the
embeddings of the run, from strings or images. Note: imported by sentence-transformers alone, by its name in
``modules.json``, with ``SentenceTransformer(folder, trust_remote_code=True)``; clasp must be installed. Preprocessing
is that of the run, so image files too give its embeddings. For inference: the base weights stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules.input_module import InputModule  # pyright: ignore[reportMissingImports]
from torch import Tensor

from clasp.config.build import load
from clasp.models.dual_encoder import DualEncoder
from clasp.models.inference import EmbeddingModel
from clasp.types import Pixels, Tokens, UserError


class RunEncoder(InputModule):
    """Strings or images to embeddings of length 1."""

    save_in_root = True

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        assert isinstance(model.encoder, DualEncoder)
        self.encoder = model.encoder
        self._transform, self._tokenizer = model.transform, model.tokenizer

    @property
    def modalities(self) -> list[Any]:
        """The kinds of inputs."""
        return ["text", "image"]

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens, special tokens included."""
        return self._tokenizer.max_tokens

    def get_embedding_dimension(self) -> int:
        """E, the width of the joint space."""
        return self.encoder.embed_text(Tokens(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2).bool())).shape[1]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """All strings, or all images. A prompt is put before each string, and before the prefix of the tower."""
        if all(isinstance(each, str) for each in inputs):
            tokens = self._tokenizer([(prompt or "") + each for each in inputs])
            return {"input_ids": tokens.ids, "attention_mask": tokens.mask, "modality": "text"}
        return {"pixel_values": torch.stack([self._transform(each) for each in inputs]), "modality": "image"}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding``."""
        if "pixel_values" in features:
            embedded: Tensor = self.encoder.embed_image(Pixels(features["pixel_values"]))
        else:
            embedded = self.encoder.embed_text(Tokens(features["input_ids"], features["attention_mask"].bool()))
        return {**features, "sentence_embedding": embedded}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Raises ``UserError``: the run is saved by clasp."""
        raise UserError("a run is not saved by sentence-transformers; copy the folder that clasp export wrote")

    @classmethod
    def load(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, model_name_or_path: str, **kwargs: Any
    ) -> RunEncoder:
        """The run in the folder."""
        return cls(load(model_name_or_path, precision="float32"))
