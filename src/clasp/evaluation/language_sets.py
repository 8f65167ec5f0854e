"""Sets of languages: requested languages, trained languages, and the macro mean over a set.

Input: languages and results per language. Output: for each named set one result per direction, in which every language
has the same weight. Note: the notation ``macro:SET`` and the mean are defined only here; the multilingual task,
retention and the result tables use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

from clasp.data.plugins import valid_names
from clasp.evaluation.results import PartialResult, mean_result
from clasp.types import UserError

LanguageSets = Mapping[str, Sequence[str]]
"""Name of a set to the languages in it"""
TrainingStatus = Literal["trained", "never_trained", ""]
"""Whether a run was trained on a language; empty where that is unknown"""

ALL_LANGUAGES = "all"
_MACRO = "macro:"


def macro_language(title: str) -> str:
    """The ``language`` of a result that is the mean over the set ``title``."""
    return f"{_MACRO}{title}"


def macro_set(language: str) -> str | None:
    """The inverse of ``macro_language``; ``None`` for a language."""
    return language.removeprefix(_MACRO) if language.startswith(_MACRO) else None


def requested_languages(option: str | None, there: Sequence[str], data: str) -> list[str]:
    """The languages in ``option``, separated by commas, or all. Raises ``UserError`` for one not in ``there``."""
    wanted = option.split(",") if option else list(there)
    require_languages(wanted, there, data)
    return wanted


def require_languages(wanted: Sequence[str], there: Sequence[str], data: str) -> None:
    """Raises ``UserError`` for a language that no caption of ``data`` is in."""
    if odd := [language for language in wanted if language not in there]:
        named = f"there are {', '.join(there)}" if there else "its captions name no language"
        raise UserError(f"no caption of {data} is in {', '.join(odd)}; {named}")


def training_status(language: str, trained: AbstractSet[str] | None) -> TrainingStatus:
    """Which of the two sets a language belongs to; ``trained`` is ``None`` where it is unknown."""
    if trained is None or not language:
        return ""
    return "trained" if language in trained else "never_trained"


def check_language_sets(sets: LanguageSets, known: Sequence[str]) -> None:
    """Raises ``UserError`` for a set that is empty, names a language twice, or one that is not among ``known``."""
    for title, languages in sets.items():
        if not languages or len(set(languages)) < len(languages):
            raise UserError(f"the set {title!r} must name at least one language, and each once: {list(languages)}")
        for language in languages:
            if language not in known:
                raise UserError(f"the set {title!r} names {language!r}; {valid_names(language, known)}")


def macro_results(results: Sequence[PartialResult], sets: LanguageSets) -> list[PartialResult]:
    """For each set, and each direction in it, the mean over its languages."""
    means = []
    for title, languages in sets.items():
        members = [result for result in results if result.language in set(languages)]
        for direction in dict.fromkeys(result.direction for result in members):
            same = [result for result in members if result.direction == direction]
            seconds = sum(result.own_seconds for result in same)
            means.append(mean_result(same, language=macro_language(title), direction=direction, own_seconds=seconds))
    return means
