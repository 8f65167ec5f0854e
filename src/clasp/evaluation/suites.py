"""Suites: data sets that are evaluated together, each with its task and the metric that the benchmark reports.

Input: the name of a suite, or a TOML file with ``[[set]]`` tables, and the folder of the data. Output: ``SuiteSet``s
with the options of their task. Note: the data of a set is the folder of its name, in any layout that is read
(``docs/data.md``); nothing is downloaded, and ``source`` says where a set is to be had.
"""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from clasp.errors import UserError

SuiteTask = Literal[
    "zeroshot", "multilabel", "probe", "multilabel_probe", "retrieval", "multilingual", "sugarcrepe", "winoground"
]
_RECALLS = ("mean_recall", "recall@1", "recall@5", "recall@10", "median_rank")
_PRECISIONS = ("mean_average_precision", "mean_11_point_precision", "mean_roc_auc")
TASK_METRICS: dict[SuiteTask, tuple[str, ...]] = {
    "zeroshot": ("top1", "top5", "mean_per_class", "roc_auc"),
    "multilabel": _PRECISIONS,
    "probe": ("top1", "mean_per_class"),
    "multilabel_probe": _PRECISIONS,
    "retrieval": _RECALLS,
    "multilingual": _RECALLS,
    "sugarcrepe": ("accuracy",),
    "winoground": ("group_score", "text_score", "image_score"),
}
"""Task to its metrics, the default one first; ``roc_auc`` needs two classes"""
PROMPTED_TASKS: tuple[SuiteTask, ...] = ("zeroshot", "multilabel")
"""Those with class names and templates"""
_PROBE_OF: dict[SuiteTask, SuiteTask] = {"zeroshot": "probe", "multilabel": "multilabel_probe"}
_CLASS_FILES = ("classnames.txt", "labels.txt")
_TEMPLATE_FILE = "zeroshot_classification_templates.txt"
_ELEVATER = "https://github.com/Computer-Vision-in-the-Wild/Elevater_Toolkit_IC"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSet:
    """One data set: its folder, the task, and the metric of the benchmark."""

    name: str
    task: SuiteTask = "zeroshot"
    metric: str
    source: str = ""
    """Where the data is to be had"""
    folder: str = ""
    """The folder of the data, where several sets have the same; ``name`` if left out"""
    split: str = ""
    """The split that is asked about, of a task that fits nothing; the whole folder if left out"""
    templates: str = ""
    """Those of the benchmark, in place of those in the folder"""
    settings: str = ""
    """Further options of the task, separated by blanks: ``shots=16 draws=5``"""

    def path(self, data: Path) -> Path:
        """The folder of the set below that of all sets."""
        return data / (self.folder or self.name)

    def options(self, folder: Path, templates: str | None) -> list[str]:
        """The options of the task: data, and the class names and templates that its folder has; of a probe, the splits
        ``test`` and ``train``, folders or lists of ELEVATER.

        ``templates``: those of every set, in place of its own.
        """
        data, settings = self.path(folder), shlex.split(self.settings)
        if self.task in _PROBE_OF.values():
            return [f"data={_split(data, 'test')}", f"fit={_split(data, 'train')}", *settings]
        given = [f"data={_split(data, self.split) if self.split else data}", *settings]
        if self.task in PROMPTED_TASKS:
            given += [f"classes={data / name}" for name in _CLASS_FILES if (data / name).is_file()][:1]
            if chosen := self.templates if templates is None else templates:
                given.append(f"templates={chosen}")
            elif (data / _TEMPLATE_FILE).is_file():
                given.append(f"templates={data / _TEMPLATE_FILE}")
        return given


def _split(data: Path, name: str) -> Path:
    """The folder of a split, or the list of its name where there is no folder."""
    folder, listed = data / name, data / f"{name}.txt"
    return listed if listed.is_file() and not folder.is_dir() else folder


def _elevater(name: str, metric: str = "top1", task: SuiteTask = "zeroshot") -> SuiteSet:
    return SuiteSet(name=name, task=task, metric=metric, source=_ELEVATER)


def _probed(each: SuiteSet) -> SuiteSet:
    """The same set, probed; by accuracy where a probe lacks its metric."""
    task = _PROBE_OF[each.task]
    metrics = TASK_METRICS[task]
    return replace(each, task=task, metric=each.metric if each.metric in metrics else metrics[0])


# Li et al., NeurIPS 2022 (ELEVATER), image classification. Names: vision_datasets.json of the toolkit; metrics:
# TEST.METRIC in its resources/datasets/*.yaml, read in the copy of eric-ai-lab/PEViT, commit 8c9ab98
_ELEVATER_SETS = (
    _elevater("caltech-101", "mean_per_class"),
    _elevater("cifar-10"),
    _elevater("cifar-100"),
    _elevater("country211"),
    _elevater("dtd"),
    _elevater("eurosat_clip"),
    _elevater("fer-2013"),
    _elevater("fgvc-aircraft-2013b-variants102", "mean_per_class"),
    _elevater("food-101"),
    _elevater("gtsrb"),
    _elevater("hateful-memes", "roc_auc"),
    _elevater("kitti-distance"),
    _elevater("mnist"),
    _elevater("oxford-flower-102", "mean_per_class"),
    _elevater("oxford-iiit-pets", "mean_per_class"),
    _elevater("patch-camelyon"),
    _elevater("rendered-sst2"),
    _elevater("resisc45_clip"),
    _elevater("stanford-cars"),
    _elevater("voc-2007-classification", "mean_11_point_precision", "multilabel"),
)
# the others of which the same toolkit has class names (datasets/prompts.py), without birdsnap
_MORE_PROBED = tuple(
    SuiteSet(name=name, task="probe", metric="top1", source=source)
    for name, source in (
        ("imagenet-1k", "https://www.image-net.org"),
        ("stl10", "https://cs.stanford.edu/~acoates/stl10"),
        ("sun397", "https://vision.princeton.edu/projects/2010/SUN"),
        ("ucf101", "https://www.crcv.ucf.edu/data/UCF101.php"),
    )
)


def _mieb(name: str, data: str, task: SuiteTask, **given: str) -> SuiteSet:
    source = f"https://huggingface.co/datasets/{data}"
    return SuiteSet(name=name, task=task, metric=TASK_METRICS[task][0], source=source, **given)


def _mieb_probe(name: str, data: str) -> SuiteSet:
    return _mieb(name, data, "probe", settings="shots=16 draws=5")


def _mieb_zeroshot(name: str, data: str, prompt: str, split: str = "test") -> SuiteSet:
    return _mieb(f"{name}ZeroShot", data, "zeroshot", folder=name, templates=prompt, split=split)


# Xiao et al., ICCV 2025 (MIEB), the list "MIEB(lite)" of mteb 2.26.24, benchmarks/benchmarks.py: 51 tasks, by their
# names there. Data sets, splits, prompts, 16 images of a class and 5 draws: those of the task classes
_MIEB_LITE_SETS = (
    _mieb_probe("Country211", "mteb/wds_country211"),
    _mieb_probe("DTD", "mteb/dtd"),
    _mieb_probe("EuroSAT", "mteb/eurosat-rgb"),
    _mieb_probe("GTSRB", "mteb/wds_gtsrb"),
    _mieb_probe("OxfordPets", "mteb/OxfordPets"),
    _mieb_probe("PatchCamelyon", "mteb/wds_vtab-pcam"),
    _mieb_probe("RESISC45", "mteb/resisc45"),
    _mieb_probe("SUN397", "mteb/sun397"),
    _mieb_zeroshot("CIFAR100", "mteb/cifar100", "a photo of a {}."),
    _mieb_zeroshot("Country211", "mteb/wds_country211", "a photo showing the country of {}."),
    _mieb_zeroshot("FER2013", "mteb/wds_fer2013", "a photo of a {} looking face."),
    _mieb_zeroshot("FGVCAircraft", "mteb/FGVCAircraftZeroShot", "a photo of a {}, a type of aircraft."),
    _mieb_zeroshot("Food101", "mteb/food101", "a photo of {}, a type of food.", "validation"),
    _mieb_zeroshot("OxfordPets", "mteb/OxfordPets", "a photo of a {}, a type of pet."),
    _mieb_zeroshot("StanfordCars", "mteb/StanfordCars", "a photo of a {}."),
    _mieb("AROCocoOrder", "mteb/ARO-COCO-order", "sugarcrepe"),
    _mieb("AROFlickrOrder", "mteb/ARO-Flickr-Order", "sugarcrepe"),
    _mieb("AROVisualAttribution", "mteb/ARO-Visual-Attribution", "sugarcrepe"),
    _mieb("AROVisualRelation", "mteb/ARO-Visual-Relation", "sugarcrepe"),
    _mieb("Winoground", "facebook/winoground", "winoground"),
)
MTEB_TASKS: dict[str, tuple[str, ...]] = {
    "mieb-lite": tuple(
        """
        ImageNetDog15Clustering TinyImageNetClustering BLINKIT2IMultiChoice CVBenchCount CVBenchRelation CVBenchDepth
        CVBenchDistance ImageCoDe STS13VisualSTS STS15VisualSTS VisualSTS17Multilingual VisualSTS-b-Multilingual
        CIRRIT2IRetrieval CUB200I2IRetrieval Fashion200kI2TRetrieval HatefulMemesI2TRetrieval InfoSeekIT2TRetrieval
        NIGHTSI2IRetrieval OVENIT2TRetrieval RP2kI2IRetrieval VidoreDocVQARetrieval VidoreInfoVQARetrieval
        VidoreTabfquadRetrieval VidoreTatdqaRetrieval VidoreShiftProjectRetrieval VidoreSyntheticDocQAAIRetrieval
        VisualNewsI2TRetrieval VQA2IT2TRetrieval WebQAT2ITRetrieval WITT2IRetrieval XM3600T2IRetrieval
        """.split()
    )
}
"""The tasks of a suite that mteb alone computes, on ``clasp.as_mteb(RUN)``: clustering, Spearman correlation, multiple
choice and retrieval with images and texts in one query, nDCG among a corpus with relevance judgements"""
SUITES: dict[str, tuple[SuiteSet, ...]] = {
    "elevater-20": _ELEVATER_SETS,
    # You et al., ECCV 2022 (MS-CLIP): linear probes on 24 sets; which 24 is not in the published code, whose
    # lib/evaluation/dataset.py reads VOC 2007, Hateful Memes and ChestX-ray8. Metrics: those of CLIP's probes (Radford
    # et al., 2021, appendix A), but accuracy on hateful-memes
    "msclip-24": tuple(sorted([*map(_probed, _ELEVATER_SETS), *_MORE_PROBED], key=lambda each: each.name)),
    "mieb-lite": _MIEB_LITE_SETS,
}
"""Name to data sets, for ``clasp eval --suite``"""


def find_suite(name: str) -> tuple[SuiteSet, ...]:
    """The suite of this name, or of a TOML file. Raises ``UserError``."""
    if name in SUITES:
        return SUITES[name]
    file = Path(name)
    if not file.is_file():
        near = get_close_matches(name, SUITES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = f"there are {', '.join(SUITES)}, or name a TOML file with [[set]] tables"
        raise UserError(f"no suite {name!r}; {hint}{known}")
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8-sig")).get("set", [])
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a TOML file: {error}") from None
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{file} has no [[set]] tables; each has a name, and may have {', '.join(_KEYS[1:])}")
    sets = tuple(_read_set(table, f"{file}, set {number}") for number, table in enumerate(tables, 1))
    names = [each.name for each in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{file} names the set {twice[0]!r} twice")
    return sets


_KEYS = tuple(field.name for field in fields(SuiteSet))


def _read_set(table: Any, where: str) -> SuiteSet:
    if not isinstance(table, dict) or "name" not in table or {str} != {type(value) for value in table.values()}:
        raise UserError(f"{where} must have a name and texts: {', '.join(_KEYS)}")
    if unknown := [key for key in table if key not in _KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    if empty := [key for key, value in table.items() if not value.strip()]:
        raise UserError(f"{where}: {empty[0]} is empty; leave it out, or give a value")
    task = table.get("task", "zeroshot")
    if task not in TASK_METRICS:
        raise UserError(f"{where}: task = {task!r} is not one of {', '.join(TASK_METRICS)}")
    metrics = TASK_METRICS[task]
    if table.get("metric", metrics[0]) not in metrics:
        raise UserError(f"{where}: {task} has no metric {table['metric']!r}; it has {', '.join(metrics)}")
    try:
        shlex.split(table.get("settings", ""))
    except ValueError as error:
        raise UserError(f"{where}: settings = {table['settings']!r}: {str(error).lower()}") from None
    for key, tasks in (("templates", PROMPTED_TASKS), ("split", sorted(set(TASK_METRICS) - set(_PROBE_OF.values())))):
        if table.get(key) and task not in tasks:
            raise UserError(f"{where}: {key} = {table[key]!r} is for {', '.join(tasks)}, and task is {task}")
    return SuiteSet(**{"metric": metrics[0], **table})
