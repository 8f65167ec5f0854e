"""What an evaluation depends on beside the model, so that two evaluations are not taken for one.

Input: a task, its options, and the pairs and files that these name. Output: ``EvaluationIdentity``, the options as used
and a hash, which every row of the evaluation records. Note: pairs and files count by content, not by path: the same
pairs at another place are the same evaluation, and an edited list of classes is another. Images count by the ids of
their pairs, since another copy of a file has another time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clasp.data.pairs import Pairs
from clasp.evaluation.from_pairs import VALIDATION, validation_texts
from clasp.evaluation.registry import TaskEntry, used_options
from clasp.evaluation.results import EvaluationResult
from clasp.evaluation.task_context import TaskContext
from clasp.types import Pair

_DEFINITION = 2  # of the metrics: counted up where the same task on the same pairs has other numbers
_OWN = "-validation"  # ends the id of the evaluation that a run makes of itself


@dataclass(frozen=True, slots=True)
class EvaluationIdentity:
    """The options that an evaluation was run with, and the hash of all that its metrics depend on beside the model."""

    options: Mapping[str, str]
    id: str

    def recorded_in(self, results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
        """The rows, with options and hash."""
        return [replace(row, options=dict(self.options), evaluation_id=self.id) for row in results]


def identify(task: str, entry: TaskEntry, context: TaskContext) -> EvaluationIdentity:
    """The identity of a task as it is run in ``context``."""
    options = used_options(entry, context.options)
    kinds = {option.name: option.names for option in entry.all_options}
    settings = {
        name: _content(value) if kinds[name] == "file" else value
        for name, value in options.items()
        if kinds[name] not in ("pairs", "reading")
    }
    others = {name: context.open_pairs(value) for name, value in options.items() if kinds[name] == "pairs"}
    return EvaluationIdentity(options, evaluation_hash(task, settings, {"data": context.pairs, **others}))


def validation_identity(task: str, train: Pairs, val: Pairs) -> EvaluationIdentity:
    """The identity of the validation of a run, which has no options."""
    found = evaluation_hash(task, {"texts": validation_texts(train, val)}, {VALIDATION: val})
    return EvaluationIdentity({}, f"{found}{_OWN}")


def is_own_validation(result: EvaluationResult) -> bool:
    """Whether a row is of the evaluation that a run makes of itself; one of clasp 0.1 is known by its data alone."""
    return result.evaluation_id.endswith(_OWN) or (not result.evaluation_id and result.data == VALIDATION)


def evaluation_hash(task: str, settings: Mapping[str, object], pairs: Mapping[str, Iterable[Pair]]) -> str:
    """16 hexadecimal digits of the sha256 over the definition of the metrics, task, settings, and the ids, groups,
    captions and metadata of pairs."""
    digest = hashlib.sha256(json.dumps([_DEFINITION, task, settings], sort_keys=True).encode())
    for name in sorted(pairs):
        digest.update(f"\n{name}\n".encode())
        groups: dict[str, int] = {}
        for pair in pairs[name]:  # groups by number, since their names may be paths
            about = [pair.id, groups.setdefault(pair.group, len(groups)), pair.captions, pair.meta]
            digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _content(value: str) -> str:
    """The sha256 of the file that a value names; the value itself where it names none."""
    try:
        return hashlib.sha256(Path(value).read_bytes()).hexdigest() if Path(value).is_file() else value
    except (OSError, ValueError):  # a template as long as no file name can be, or with a null character
        return value
