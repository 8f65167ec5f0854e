"""The objects of a training run, opened once: recipe, model, pairs, run folder, ledger and tracker.

Input: a folder, a recipe, and the objects opened for it. Output: ``RunContext``, started in its folder or checked
against it. Note: a run is resumed with the same recipe, towers and pairs only; its trackers may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from clasp.config.build import ModelAndPreprocessing
from clasp.config.datasets import TrainValPairs
from clasp.config.recipe import Recipe
from clasp.config.run_plan import hash_pairs
from clasp.data.pairs import Pairs
from clasp.data.readers import PairIndex
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.precision import resolve_precision
from clasp.training.attention_kernel import choose_attention_kernel, use_attention_kernel
from clasp.training.class_pairs import WeightedClassPairs
from clasp.training.cost import COST_FILE
from clasp.training.cost.ledger import CostLedger, RunCost, read_cost
from clasp.training.distributed import Processes
from clasp.training.loop import count_evaluations
from clasp.training.recipe_changes import describe_changes
from clasp.training.run_folder import RunFolder
from clasp.training.settings import TrainPlan
from clasp.training.state import TrainState
from clasp.training.trackers.console import Reporter
from clasp.training.trackers.group import TrackerGroup
from clasp.types import UserError

HeadInitializer = Callable[[DualEncoder], None]
"""Sets the heads of a model to what ``initialize_heads`` would compute from the pairs"""


@dataclass(frozen=True, slots=True)
class Preloaded:
    """What a run need not make itself.

    ``pairs``: those of its recipe, where they are open. ``parts``: its model, where it is in memory; it is trained in
    place. ``heads``: what sets the heads, where their closed form was computed before. ``tuned``: the folder of the
    cached features of towers that were tuned before and take no step here. ``processes`` train together.
    """

    pairs: TrainValPairs | None = None
    parts: ModelAndPreprocessing | None = None
    heads: HeadInitializer | None = None
    tuned: Path | None = None
    processes: Processes = field(default_factory=Processes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The objects of a run. ``recipe`` is resolved: batch size, epochs and attention kernel are not "auto".

    ``train``: those of the pairs ``opened`` that ``data.max_pairs`` selects; classes of validation are named by all.
    ``classes``: class pairs that count in the closed form. ``heads``: where that was computed before. ``state``: the
    saved state of a resumed run, ``None`` for a new one. ``listing``: the index of the captions of ``train``. Every one
    of ``processes`` has its own context; only the first writes to the folder.
    """

    folder: RunFolder
    recipe: Recipe
    parts: ModelAndPreprocessing
    inputs: FeatureSource
    opened: Pairs
    train: Pairs
    val: Pairs
    classes: WeightedClassPairs | None
    heads: HeadInitializer | None
    listing: PairIndex
    state: TrainState | None
    ledger: CostLedger
    tracker: TrackerGroup
    reporter: Reporter
    processes: Processes

    @property
    def model(self) -> DualEncoder:
        """The model that is trained."""
        return self.parts.model

    def attention_kernel(self) -> AbstractContextManager[None]:
        """The attention kernel of the run, for as long as the context lasts."""
        kernel = self.recipe.train.attention
        assert kernel != "auto", "resolve the recipe first"
        return use_attention_kernel(kernel)

    def count_candidates(self) -> int:
        """The evaluations among which the best selects the weights; 1 where those of the last step are kept."""
        settings = self.recipe.train
        return count_evaluations(settings) if settings.select == "best" else 1

    def start_or_resume(self) -> None:
        """Write the files that training does not change; of a resumed run, check them. Raises ``UserError``, also where
        processes have other pairs or other weights."""
        content = hash_pairs(self.listing, self.val)
        towers = (self.model.image, self.model.text)
        if self.processes.size > 1:
            weights = {f"weights of the {tower.modality} tower": tower.fingerprint for tower in towers}
            self.processes.require_same({"pairs": content, **weights})
        self.processes.first(lambda: self._start_or_check(content))

    def _start_or_check(self, content: str) -> None:
        if self.state is None:
            parts = self.parts
            self.folder.start(self.recipe.to_toml(), parts.model, parts.transform, parts.tokenizer, pairs=content)
            return
        metadata = self.folder.read()
        self.folder.require_same_bases(self.model)
        if self.recipe.differs_from(metadata.recipe):
            changes = "; ".join(describe_changes(metadata.recipe, self.recipe.to_dict()))
            raise UserError(
                f"{self.folder.path} was started with another recipe ({changes}); a run goes on with its own only"
            )
        if metadata.base.get("pairs") != content:
            raise UserError(
                f"{self.folder.path} cannot go on: the pairs of {self.recipe.data.train} have changed since it was "
                "stopped"
            )


def read_earlier_cost(folder: RunFolder, state: TrainState | None) -> RunCost | None:
    """The cost of the earlier sessions of a resumed run, where its ``cost.json`` exists."""
    return read_cost(folder.path) if state is not None and (folder.path / COST_FILE).exists() else None


def open_ledger(model: DualEncoder, state: TrainState | None, earlier: RunCost | None) -> CostLedger:
    """The cost ledger of this session."""
    parts = {name: {"total": count.total, "trained": count.trained} for name, count in model.parameter_counts().items()}
    device = next(model.parameters()).device
    return CostLedger(device, parts, first_step=state.position.step if state else 0, earlier=earlier)


def resolve_recipe(recipe: Recipe, plan: TrainPlan, model: DualEncoder, state: TrainState | None = None) -> Recipe:
    """The recipe as saved in the run, so that it resumes unchanged: batch size, epochs, precision, attention kernel and
    layers resolved. A run that is resumed from ``state`` keeps its precision, whatever would be measured now."""
    device = next(model.parameters()).device
    settings = plan.resolved(recipe.train)
    precision = state.precision if state else resolve_precision(settings.precision, device).precision
    if state is None:
        settings = settings.model_copy(update={"precision": precision})
    kernel = choose_attention_kernel(settings.attention, precision, device)
    towers = {"image": (recipe.image, model.image), "text": (recipe.text, model.text)}
    numbered = {
        side: each.model_copy(update={"extra_layers": list(tower.extra_layers)})
        for side, (each, tower) in towers.items()
        if each.extra_layers == "all"
    }
    return recipe.model_copy(update={"train": settings.model_copy(update={"attention": kernel.attention}), **numbered})
