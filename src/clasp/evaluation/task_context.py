"""The arguments of an evaluation task: a model, the pairs it is evaluated on, and the options.

``clasp eval`` creates one and passes it to the task's entry in ``registry``. Note: the model is loaded when it is first
needed, so that pairs and options a task refuses cost no time; ``options`` has the given options and those with a
default; others are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from clasp.config.recipe import Recipe
from clasp.data.distinct_captions import EVALUATION, indistinct_captions
from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_table import EvaluationInputs, ImageBatches, TextBatches
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.types import Encoder, MessageCallback, ProgressFactory, TextInput


@dataclass(frozen=True, slots=True)
class TrainedTowers:
    """The model of a run, and what it reads."""

    model: DualEncoder
    inputs: FeatureSource


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An encoder and what it reads; ``towers`` where it is a run's."""

    encoder: Encoder
    inputs: EvaluationInputs
    towers: TrainedTowers | None = None


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The run that a model comes from, for tasks on its towers and its recipe (``TaskEntry.needs_run``)."""

    folder: Path
    recipe: Recipe


class DeferredInputs:
    """The ``EvaluationInputs`` of a model that is loaded when the first stream is read.

    ``say`` is called once where the text tower of ``model`` cannot tell the captions of a stream apart, the prompts of
    ``tell_apart``, or, where there are none of these, all other texts: their results are near chance.
    """

    def __init__(self, load: Callable[[], EvaluationInputs], say: MessageCallback, model: str) -> None:
        self._load, self._say, self._model = load, say, model
        self._announced, self._prompts = list[list[str]](), list[Sequence[str]]()

    @cached_property
    def _loaded(self) -> EvaluationInputs:
        inputs = self._load()
        for prompts in self._prompts:
            self._say_indistinct(prompts, inputs)
        while self._announced:
            inputs.precompute_texts(self._announced.pop())
        return inputs

    def images(self, pairs: Pairs) -> ImageBatches:
        """The images of ``pairs`` with their ids."""
        stream = cache(lambda: self._loaded.images(pairs))
        return lambda: stream()()

    def texts(self, texts: Mapping[str, str]) -> TextBatches:
        """Captions, given as id to text."""

        @cache
        def stream() -> TextBatches:
            self._say_indistinct(texts.values(), self._loaded)
            return self._loaded.texts(texts)

        return lambda: stream()()

    def read(self, texts: Sequence[str]) -> Iterable[tuple[Sequence[str], TextInput]]:
        """Texts that are their own ids."""
        if not self._prompts:
            self._say_indistinct(texts, self._loaded)
        return self._loaded.read(texts)

    def tell_apart(self, prompts: Sequence[str]) -> None:
        """Announces prompts of all classes, of one template: those of several differ in more than the class."""
        self._prompts.append(prompts)
        if "_loaded" in vars(self):
            self._say_indistinct(prompts, self._loaded)

    def _say_indistinct(self, texts: Iterable[str], inputs: EvaluationInputs) -> None:
        if isinstance(inputs, FeatureSource):
            if reason := indistinct_captions(list(dict.fromkeys(texts)), inputs.tokenizer, EVALUATION):
                self._say(f"warning: {self._model}: {reason}")

    def precompute_texts(self, texts: Iterable[str]) -> None:
        """Announces the texts of many small requests."""
        self._announced.append(list(texts))
        if "_loaded" in vars(self):
            self._loaded.precompute_texts(self._announced.pop())


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """The model with its inputs, and the pairs.

    ``name`` is the model as typed. ``load`` is called once, by ``model``, ``towers``, or when a stream of ``inputs`` is
    read. ``open_pairs`` opens further pairs as ``pairs`` were opened, with the same columns. ``run`` is ``None`` where
    the model is not a run's. ``model`` keeps the embeddings of live images by their bytes (``EncodeOnce``): a task that
    changes weights reads them anew through ``towers``. ``say`` is called with status lines beside the results; ``bar``
    opens progress bars.
    """

    name: str
    load: Callable[[], LoadedModel]
    pairs: Pairs
    open_pairs: Callable[[str], Pairs]
    options: Mapping[str, str]
    run: TrainedRun | None
    say: MessageCallback
    bar: ProgressFactory

    @cached_property
    def _loaded(self) -> LoadedModel:
        return self.load()

    @property
    def model(self) -> Encoder:
        """The model, loaded."""
        return self._loaded.encoder

    @cached_property
    def inputs(self) -> DeferredInputs:
        """What the model reads; a task is made of them before the model is loaded."""
        return DeferredInputs(lambda: self._loaded.inputs, self.say, self.name)

    @property
    def towers(self) -> TrainedTowers:
        """The towers of ``run``, loaded."""
        assert self._loaded.towers is not None, "the TaskEntry of a task on towers needs a run"
        return self._loaded.towers

    @property
    def data(self) -> str:
        """The name of the pairs as given: the ``data`` of every result."""
        return self.options["data"]
