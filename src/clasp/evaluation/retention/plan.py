"""The retention probes that are possible on some pairs: their kinds, languages and fit sets.

Input: a ``TaskContext``. Output: ``RetentionPlan``. No image is read and no tower run, so errors are raised at once; a
status line names each probe that the pairs do not allow. Note: the languages a run was trained on are those its
recipe names, else those its training pairs name, else unknown; they are never inferred from the towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from clasp.config.datasets import open_pairs_for_recipe
from clasp.config.recipe import Recipe
from clasp.data.pairs import Pairs, caption_languages
from clasp.errors import counted
from clasp.evaluation.class_labels import column_choices, has_labels
from clasp.evaluation.language_sets import requested_languages, require_languages
from clasp.evaluation.retention.probes import ImageProbe, TextProbe, make_image_probe, make_text_probes
from clasp.evaluation.task_context import TaskContext
from clasp.types import UserError


@dataclass(frozen=True, kw_only=True)
class RetentionPlan:
    """The probes of the towers of a run. ``label`` is the column of the classes, where there are any."""

    data: str
    pairs: Pairs
    fit: Pairs | None
    label: str | None
    image: ImageProbe | None
    text: list[TextProbe]
    languages: list[str]

    @property
    def classes(self) -> list[str]:
        """The classes of ``data``, sorted."""
        return sorted({str(pair.meta[self.label]) for pair in self.pairs}) if self.label else []

    @property
    def captions(self) -> list[str]:
        """The distinct captions in ``languages``, sorted."""
        wanted = self.languages or [""]
        return sorted({c.text for pair in self.pairs for c in pair.captions if c.language in wanted})


def plan_probes(context: TaskContext) -> RetentionPlan:
    """The probes that the pairs allow; those left out are reported. Raises ``UserError`` where there are none."""
    assert context.run is not None
    pairs, recipe, options = _in_memory(context.pairs), context.run.recipe, context.options
    data, label, anchor = context.data, options.get("label"), options.get("anchor", "en")
    labelled = has_labels(pairs, label, data)
    label = label or "class"
    if "fit" in options and not labelled:
        raise UserError(f"fit={options['fit']}: {data} has no column {label!r} with classes; name another with label=")
    fit = _in_memory(context.open_pairs(options["fit"])) if "fit" in options else None
    there = caption_languages(pairs)
    wanted = requested_languages(options.get("languages"), there, data)
    require_languages([anchor] if "anchor" in options else [], there, data)
    trained = trained_languages(recipe) if there else None
    text = make_text_probes(pairs, sorted(set(wanted)), anchor, trained, data)
    if not labelled and not text:
        raise UserError(
            f"nothing to probe in {data}: no column {label!r} (name another with label=), no captions in {anchor!r} "
            "and another language, and no two pairs with several captions in one"
        )
    image = make_image_probe(pairs, fit, label, data, options.get("fit", "")) if labelled else None
    _report_skipped(context, pairs, image, text, trained)
    languages = [language for language in there if language in wanted or language == anchor]
    return RetentionPlan(
        data=data, pairs=pairs, fit=fit, label=label if labelled else None, image=image, text=text, languages=languages
    )


def trained_languages(recipe: Recipe) -> set[str] | None:
    """The languages that the recipe names, else those of its training pairs; ``None`` if unknown or not readable."""
    if recipe.data.languages:
        return set(recipe.data.languages)
    if recipe.data.train is None:
        return None
    try:
        return set(caption_languages(open_pairs_for_recipe(recipe.data.train, recipe))) or None
    except UserError:
        return None


def _in_memory(pairs: Pairs) -> Pairs:
    """The same pairs in memory: they are iterated many times, and a table row is read from disk each time."""
    return Pairs(pairs.name, [list(pairs)])


def _report_skipped(
    context: TaskContext,
    pairs: Pairs,
    image: ImageProbe | None,
    text: Sequence[TextProbe],
    trained: AbstractSet[str] | None,
) -> None:
    """Report what is left out, and why."""
    assert context.run is not None
    data, run, say = context.data, context.run.folder.name, context.say
    if image is None:
        say(f"the image tower is not probed: {data} has no column 'class'; {column_choices('label', pairs[0])}")
    elif image.skipped:
        skipped = counted(image.skipped, "image")
        say(f"not queried: {skipped}, of whose class the half to fit on has none; fit= helps")
    if not text:
        say(f"the text tower is not probed: {data} has no captions in two languages, nor several in one for an image")
    elif trained is None and text[0].language:
        say(f"which languages {run} was trained on is unknown: neither its recipe nor its training pairs name them")
