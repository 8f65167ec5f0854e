"""The stages of ``clasp train auto`` in closed form: of the frozen towers, of few pairs or all, and of tuned towers.

Input: the user's recipe, the pairs, and the stages of a session. Output: the heads that validation chooses
(``commands.closed_form``), trained as stages. Note: where the minutes are short, the first stage is the closed form of
the last layers of few pairs, which tuning starts from; that of all pairs follows where no step of tuning fits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from accelerate import PartialState

from clasp.commands.auto_stages import AutoCallbacks, AutoStages
from clasp.commands.closed_form import (
    PAIRS_FOR_LAYERS,
    ClosedFormSearch,
    ClosedFormTrial,
    SearchedLayers,
    begin_search,
    choose_start,
    choose_trial,
    may_have_class_pairs,
    search_recipe,
    tuned_search_recipe,
)
from clasp.commands.disk_space import plan_run_features, require_room_for_features
from clasp.commands.kept_trials import KeptTrials, hash_search
from clasp.commands.step_timing import TIMED_STEPS, time_closed_form
from clasp.config.auto_plan import (
    ALL_PAIRS_STAGE,
    CLOSED_FORM_STAGE,
    FEWEST_STEPS,
    RIDGES,
    START_RIDGES,
    TUNED_CLOSED_FORM,
    TUNED_RIDGES,
    TUNINGS,
    WIDTHS,
    Left,
    StepTiming,
    changed,
    few_pairs,
    plan_closed_form,
    plan_tuned_closed_form,
    tuned_closed_form_seconds,
)
from clasp.config.build import CacheFolders, build_feature_source, build_model, build_model_and_preprocessing
from clasp.config.datasets import TrainValPairs, limit_pairs
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.cache_folder import cache_folder
from clasp.data.distinct_captions import require_different_captions, require_distinct_captions
from clasp.data.readers import PairIndex
from clasp.evaluation.from_pairs import validation_task, validation_texts
from clasp.report.auto_table import AutoPlan, AutoRow
from clasp.training.run_folder import RunFolder
from clasp.training.warm_start import load_initial_weights

_SEARCH_SHARE = 0.05  # of the minutes, for a search of closed forms once its features are cached
_SHARE_WITHOUT_TUNING = 0.4  # of the time left, where tuning does not fit; the rest is for steps of the heads
_MINUTES_FOR_ALL_LAYERS = 3  # their moments alone take a quarter of a minute
_MINUTES_FOR_UPPER_HALF = 1.5  # below, for fewer pairs than these, the last layers: ridges and steps are worth more
_PAIRS_FOR_UPPER_HALF = 1024
_COUNTED_CAPTIONS = 100  # pairs whose captions are counted
_SMALL_BATCH = 64  # of a step of tuning: that of short ones, and fewer than that of others
_TUNED_NUMBER = 2 + len(TUNINGS)
TUNED_STAGE = f"{_TUNED_NUMBER}-{TUNED_CLOSED_FORM}"


@contextmanager
def _own_features(run: Path) -> Iterator[Path]:
    """A folder for the features of the tuned towers of a run, since the usual cache is by base weights; what a killed
    session left in it is deleted."""
    folder = cache_folder() / f"tuned-{hashlib.sha256(os.fsencode(os.path.realpath(run))).hexdigest()[:16]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class ClosedFormStages:
    """The stages in closed form of one session. ``base``: the user's recipe, with poolings for several layers."""

    def __init__(
        self, base: Recipe, pairs: TrainValPairs, plan: AutoPlan, stages: AutoStages, callbacks: AutoCallbacks
    ):
        self.base, self.pairs, self.plan, self.io, self._stages = base, pairs, plan, callbacks, stages
        self.minutes = stages.budget.minutes
        self._few = few_pairs(self.minutes, len(pairs[0]))
        # of a session that was killed: with its features cached, this one would measure none
        self._earlier_features = plan.seconds_of_features

    @property
    def kept(self) -> str:
        """The stage of the frozen towers that heads take their layers from."""
        whole = self.plan.row(ALL_PAIRS_STAGE)
        return CLOSED_FORM_STAGE if whole is None else ALL_PAIRS_STAGE

    def of_frozen_towers(self) -> None:
        """Stage 1: the heads in closed form that validation chooses."""
        if self._few is None:
            self._train(CLOSED_FORM_STAGE, search_recipe(self.base, self._layers), self.base)
        else:
            few = changed(self.base, {"data": {"max_pairs": self._few}})
            self._train(CLOSED_FORM_STAGE, search_recipe(few, "last"), few, start=True)

    def of_all_pairs(self) -> None:
        """The closed form of all pairs, where the first was of few and no stage tuned the towers."""
        if self._few is not None:
            self._train(ALL_PAIRS_STAGE, search_recipe(self.base, self._layers), self.base)

    @property
    def _layers(self) -> SearchedLayers:
        pairs, minutes = len(self.pairs[0]), self.minutes or float("inf")
        if pairs < PAIRS_FOR_LAYERS and may_have_class_pairs(self.base):
            return "last"
        if pairs < _PAIRS_FOR_UPPER_HALF and minutes < _MINUTES_FOR_UPPER_HALF:
            return "last"
        return "upper half" if minutes < _MINUTES_FOR_ALL_LAYERS else "all"

    def _train(self, name: str, searched: Recipe, base: Recipe, *, start: bool = False) -> None:
        """Search among the layers of ``searched``, and train the choice as a stage of ``base``; ``start``: to tune the
        towers from."""
        if self.plan.row(name) is not None:
            return
        self._drop_candidates()
        search = self._begin(searched)
        pairs = "" if base.data.max_pairs is None else f" of at most {base.data.max_pairs:,} pairs"
        self.io.say(f"features{pairs} are cached; {self._stages.seconds:,.0f} s so far")
        if start:
            chosen, reason = choose_start(self._run(search, START_RIDGES, ()))
        else:
            left = self._stages.left
            share = _SHARE_WITHOUT_TUNING * (left.seconds or 0) if self.reason_against_steps(left) else 0.0
            chosen, reason = choose_trial(self._run(search, RIDGES, share=share))
        if (left := self._stages.left.seconds) is not None and left < 0:
            reason += f"; the budget of {self._stages.budget} ended before it"
        self._stages.train(plan_closed_form(base, chosen.candidate, reason, name), search.heads(chosen.candidate))

    def of_tuned_towers(self, tuned: AutoRow | None, unbeatable: str) -> None:
        """The heads in closed form again, of the layers of the tuned towers: ``tuned``, the best stage of tuning.
        ``unbeatable``: why nothing can be better than what there is; empty where something can."""
        if self.plan.row(TUNED_STAGE) is not None:
            return
        self._drop_candidates()
        method = "closed form of the tuned towers"
        if unbeatable or tuned is None:
            return self._stages.leave_out(TUNED_STAGE, method, unbeatable or "no stage tuned the towers")
        left = self._stages.left.seconds
        if left is not None and left <= 0 and self._few is None:  # after one of few pairs, it is the first of all pairs
            return self._stages.leave_out(TUNED_STAGE, method, f"the budget of {self._stages.budget} has ended")
        folder = self._stages.folder / tuned.stage
        recipe = recipe_from_dict(RunFolder(folder).recipe(), tuned.stage)
        recipe = tuned_search_recipe(self.base, recipe, str(folder))
        with _own_features(self._stages.run) as features:
            search = self._begin(recipe, features)
            # after a start from few pairs, another trial takes as long as some steps, which are worth more
            trials = self._run(search, TUNED_RIDGES) if self._few is None else self._run(search, TUNED_RIDGES[:1], ())
            chosen, reason = choose_trial(trials)
            stage = plan_tuned_closed_form(
                recipe, _TUNED_NUMBER, chosen.candidate, f"towers of {tuned.stage}; {reason}"
            )
            self._stages.train(stage, search.heads(chosen.candidate), features)

    def cache_captions(self) -> None:
        """Cache all layers of captions that the closed form of tuned towers reads; tuning reads the last of them."""
        recipe, texts = search_recipe(self.base, "upper half"), PairIndex(self.pairs[0]).texts
        parts = build_model_and_preprocessing(recipe, lambda: texts)
        parts.model.freeze()
        parts.model.to(PartialState().device).eval()
        inputs = build_feature_source(parts, recipe, bar=self.io.bar)
        for each in (texts, *validation_texts(*self.pairs)):
            inputs.text_features(each)

    def reason_against_steps(self, left: Left) -> str:
        """Why no step of tuning can fit, before one is timed: the features of all pairs follow, those of the tuned
        towers, and steps cost at least thrice the features of their pairs, of one of their captions each."""
        if left.seconds is None:
            return ""
        features, pairs = self.plan.seconds_of_features, self.pairs[0]
        captions = [len(pair.captions) for pair in islice(pairs, _COUNTED_CAPTIONS)]
        steps = (TIMED_STEPS + FEWEST_STEPS) * min(_SMALL_BATCH, len(pairs) // 4)
        seconds = 3 * features * steps / len(pairs) / max(1.0, sum(captions) / len(captions))
        if left.seconds >= features + seconds:
            return ""
        return f"features of all pairs, about {features:,.0f} s, and the steps before them do not fit into {left}"

    def seconds_of_tuned(self, timing: StepTiming, tuning: Recipe) -> float:
        """The time that the closed form of towers tuned with a recipe will take, with its features."""
        stage = self.plan.row(CLOSED_FORM_STAGE)
        assert stage is not None
        search = self.plan.rows[0].seconds  # moments of all pairs and a trial, where the first stage took these
        if self._few is not None:
            model = build_model(tuned_search_recipe(self.base, tuning, str(self._stages.run)), meta=True)
            search = time_closed_form(model.image.width, model.text.width, len(self.pairs[0]))
        return tuned_closed_form_seconds(timing, search + stage.seconds)

    # --- a search ----------------------------------------------------------------------------------------------------

    def _begin(self, recipe: Recipe, features: Path | None = None) -> ClosedFormSearch:
        """The search over the towers of ``recipe``, or those of ``train.init_from``, frozen; ``features``: the
        folder of those of tuned towers."""
        train = limit_pairs(self.pairs[0], recipe.data.max_pairs)
        listing = PairIndex(train)
        require_different_captions(listing.texts, train.name)
        parts = build_model_and_preprocessing(recipe, lambda: listing.texts)
        require_distinct_captions(listing.texts, parts.tokenizer)
        if recipe.train.init_from is not None:
            load_initial_weights(parts.model, recipe.to_dict())
        parts.model.freeze()
        parts.model.to(PartialState().device).eval()
        began = time.monotonic()
        inputs = build_feature_source(
            parts, recipe, bar=self.io.bar, say=self.io.say, folders=CacheFolders(tuned=features)
        )
        require_room_for_features(plan_run_features(recipe, inputs, train, self.pairs[1], listing), inputs.cache)
        sides = inputs.batch_reader(train, listing, None)
        search = hash_search(recipe, sides, self.pairs[1])
        self._kept = KeptTrials(self._stages.run, search, self._stages.require_held)
        task = validation_task(*self.pairs, inputs)
        self.plan.primary = task.primary
        val, seconds = len(self.pairs[1]), time.monotonic() - began
        if features is None:
            seconds *= (len(self.pairs[0]) + val) / (len(train) + val)
            self.plan.seconds_of_features = max(seconds, self._earlier_features)
            self._earlier_features = 0.0
        self._stages.write()
        return begin_search(parts.model, recipe, sides, task, inputs)

    def _run(
        self,
        search: ClosedFormSearch,
        ridges: Sequence[tuple[float, float]],
        widths: Sequence[int] = WIDTHS,
        share: float = 0.0,
    ) -> list[ClosedFormTrial]:
        """Try candidates, each a row of the plan, the first with the seconds of the moments, for a share of the minutes
        or ``share`` seconds, whichever is longer; half as long is left for what follows."""
        began, left = time.monotonic(), self._stages.left.seconds
        share = float("inf") if self.minutes is None else max(share, _SEARCH_SHARE * 60 * self.minutes)
        limit = share if left is None else min(share, left - share / 2)
        trials = search.run(self.io.say, lambda: time.monotonic() - began > limit, ridges, widths, self._kept)
        for place, trial in enumerate(trials):
            seconds = trial.seconds + (0.0 if place else search.seconds_of_moments)
            row = AutoRow(method=str(trial.candidate), verdict="tried", seconds=seconds)
            row = replace(row, metric=trial.score.value, interval=tuple(trial.score.interval))
            self.plan.rows.append(replace(row, trained=trial.delta_bytes // 4))
        return trials

    def _drop_candidates(self) -> None:
        """Remove the candidates of a search whose stage did not end: they are taken from ``KeptTrials``."""
        while self.plan.rows and not self.plan.rows[-1].stage:
            self.plan.rows.pop()
