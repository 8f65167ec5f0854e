"""A stream of images or texts through one side of an encoder: unit vectors with their ids.

Input: an encoder and a stream that can be read again (``ImageBatches``, ``TextBatches``: each call yields chunks of ids
and inputs, in any order), from an ``EvaluationInputs``. Output: an ``EmbeddingTable``. Note: vectors are identified by
id, never by position.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.pairs import Pairs
from clasp.evaluation.name_checks import refuse_repeats
from clasp.models.packed_weights import packed_weights
from clasp.types import ImageInput, TextInput, UserError

ImageBatches = Callable[[], Iterable[tuple[Sequence[str], ImageInput]]]
TextBatches = Callable[[], Iterable[tuple[Sequence[str], TextInput]]]
# From texts to chunks for the text tower. The ids of a chunk are its texts themselves, so any order will do.
TextBatcher = Callable[[Sequence[str]], Iterable[tuple[Sequence[str], TextInput]]]

_InputT = TypeVar("_InputT")


@runtime_checkable
class EvaluationInputs(Protocol):
    """What an encoder reads of pairs and texts: a ``FeatureSource``, or embeddings that were computed elsewhere."""

    def images(self, pairs: Pairs) -> ImageBatches:
        """The images of ``pairs`` with their ids."""
        ...

    def texts(self, texts: Mapping[str, str]) -> TextBatches:
        """Captions, given as id to text."""
        ...

    def read(self, texts: Sequence[str]) -> Iterable[tuple[Sequence[str], TextInput]]:
        """Texts that are their own ids."""
        ...

    def precompute_texts(self, texts: Iterable[str]) -> None:
        """Announces the texts of many small requests."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Unit vectors and their ids; float32, on the CPU."""

    ids: tuple[str, ...]
    vectors: Float[Tensor, "n E"]

    def select(self, ids: Container[str]) -> EmbeddingTable:
        """The rows with these ids, in their order here."""
        rows = [row for row, id in enumerate(self.ids) if id in ids]
        return EmbeddingTable(tuple(self.ids[row] for row in rows), self.vectors[rows])


def embed_batches(
    chunks: Iterable[tuple[Sequence[str], _InputT]], encode: Callable[[_InputT], Float[Tensor, "B E"]], item_name: str
) -> EmbeddingTable:
    """Run a stream through one side of an encoder, without gradients. ``item_name`` names the items in errors.

    Raises:
        UserError: nothing in the stream, one id twice, or an embedding that is not finite.
    """
    ids: list[str] = []
    vectors: list[Tensor] = []
    with torch.inference_mode(), packed_weights():
        for names, inputs in chunks:
            ids.extend(names)
            vectors.append(encode(inputs).float().cpu())
            assert len(vectors[-1]) == len(names), f"{len(names)} ids for {len(vectors[-1])} embeddings"
    if not ids:
        raise UserError(f"there are no {item_name}s to evaluate on")
    refuse_repeats(ids, f"{item_name} ids")
    table = EmbeddingTable(tuple(ids), torch.cat(vectors))
    broken = (~table.vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        more = f", and those of {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"the embedding of {item_name} {ids[broken[0]]!r} is not finite{more}")
    return table
