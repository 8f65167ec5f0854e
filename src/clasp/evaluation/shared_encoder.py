"""An encoder and its inputs, shared by several processes: each encodes a part of the images and texts of an evaluation.

Input: a model with its inputs, the same on every process, and ``Processes``. Output: ``SharedEncoder``, both the
``EvaluationInputs`` and the ``Encoder`` of a task; every process gets all embeddings, in the order of one process.
Note: collective, every process makes the same task and calls it. Live tokens and pixels are read in the batches of one
process; cached features are divided otherwise, so their embeddings may differ from those of one process in the last
bits. A part of the evaluation is cached features on all processes or on none: their shares are of the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.pairs import Pairs
from clasp.data.process_group import raise_together
from clasp.evaluation.embedding_table import ImageBatches, TextBatches
from clasp.models.features import FeatureSource
from clasp.models.packed_weights import packed_weights
from clasp.training.distributed import Processes
from clasp.types import Encoder, ImageInput, PooledFeatures, SkippedSample, TextInput

_Chunks = Iterator[tuple[Sequence[str], PooledFeatures]]
_InputT = TypeVar("_InputT")


class SharedEncoder:
    """Streams whose inputs are embeddings already: ``embed_image`` and ``embed_text`` return them as they are."""

    def __init__(self, model: Encoder, inputs: FeatureSource, processes: Processes) -> None:
        self._model, self._inputs, self._processes = model, inputs, processes

    @property
    def name(self) -> str:
        """That of the model."""
        return self._model.name

    @property
    def fingerprint(self) -> str:
        """That of the model."""
        return self._model.fingerprint

    # --- inputs ------------------------------------------------------------------------------------------------------

    def images(self, pairs: Pairs) -> ImageBatches:
        """The embeddings of the images of ``pairs``; those that cannot be read are reported by each process."""
        side, processes, skipped = self._inputs.image, self._processes, list[SkippedSample]()
        features = self._cached(lambda: side.features(pairs))
        stream = raise_together(processes, lambda: side.share(pairs, features, processes, skipped.extend))
        report = side.reporter(pairs, features)

        def chunks() -> _Chunks:
            skipped.clear()
            count = 0
            for ids, embeddings in self._gathered(stream(), self._model.embed_image):
                count += len(ids)
                yield ids, embeddings
            unreadable = [sample for each in processes.gather_objects(skipped) for sample in each]
            assert count + len(unreadable) == len(pairs), f"{count} + {len(unreadable)} of {len(pairs)} images"
            report(unreadable)

        return chunks

    def texts(self, texts: Mapping[str, str]) -> TextBatches:
        """The embeddings of captions, given as id to text."""
        return lambda: self._texts(list(texts), list(texts.values()))

    def read(self, texts: Sequence[str]) -> _Chunks:
        """The embeddings of texts that are their own ids."""
        return self._texts(texts, texts)

    def precompute_texts(self, texts: Iterable[str]) -> None:
        """Cache the text features of many small requests at once."""
        unique = list(texts)
        self._processes.in_turn(lambda: self._inputs.precompute_texts(unique))

    def _texts(self, ids: Sequence[str], texts: Sequence[str]) -> _Chunks:
        side, count = self._inputs.text, 0
        share = side.share(ids, texts, self._cached(lambda: side.features(texts)), self._processes)
        for found, embeddings in self._gathered(share, self._model.embed_text):
            count += len(found)
            yield found, embeddings
        assert count == len(ids), f"{count} of {len(ids)} texts"

    def _cached(self, read: Callable[[], CachedFeatures | None]) -> CachedFeatures | None:
        """The cached features, computed by the first process; ``None`` on all where one of them reads live."""
        features = self._processes.in_turn(read)
        return features if all(self._processes.gather_objects(features is not None)) else None

    def _gathered(
        self, chunks: Iterable[tuple[Sequence[str], _InputT]], embed: Callable[[_InputT], Float[Tensor, "B E"]]
    ) -> _Chunks:
        """The embeddings of the shares of all processes, by rank: one chunk, none where there is nothing."""
        names: list[str] = []
        vectors: list[Tensor] = []

        def encode() -> None:
            with torch.inference_mode(), packed_weights():
                for ids, inputs in chunks:
                    names.extend(ids)
                    vectors.append(embed(inputs).float().cpu())

        raise_together(self._processes, encode)
        shares = self._processes.gather_objects((names, vectors[0].shape[1] if vectors else 0))
        if width := max(width for _, width in shares):
            own = torch.cat([torch.zeros(0, width), *vectors])
            rows = self._processes.gather_rows(own, [len(ids) for ids, _ in shares])
            yield [id for ids, _ in shares for id in ids], PooledFeatures(rows)

    # --- encoder -----------------------------------------------------------------------------------------------------

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        assert isinstance(inputs, PooledFeatures)
        return inputs.values

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        assert isinstance(inputs, PooledFeatures)
        return inputs.values

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        return self._model.encode_image(pixels)

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        return self._model.encode_text(tokens, mask)
