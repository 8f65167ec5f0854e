"""``clasp export RUN --to hub``: the run as a repository of the Hugging Face hub, which ``clasp.load`` loads back.

Input: a finished run. Output: its recipe, delta, hashes, transform and tokenizer, and a card with the hub's metadata;
towers that are folders of this machine are copied, so that the folder is complete but for towers of a hub or a package.
Note: paths of this machine are left out of the recipe; the delta is copied bit by bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clasp.config.recipe import recipe_from_dict
from clasp.convert.exporters.job import ExportJob, ExportOptions, ExportReport
from clasp.models.zoo.hub_runs import push_run, require_hub_token
from clasp.report.evaluation_labels import latest_results
from clasp.report.model_card import results_section
from clasp.report.run_record import read_results
from clasp.report.tables import result_tables
from clasp.training.run_folder import RECIPE_HASH, RECIPE_SETTINGS, RUN_PLACEHOLDER, hash_file

_COPIED = ("transform.json", "tokenizer", "delta.safetensors", "imported.json", "towers")
_PATHS = (("data", "train"), ("data", "val"), ("data", "image_root"), ("train", "init_from"))


def check_push(options: ExportOptions) -> None:
    """Raises ``UserError`` where ``--push`` has no token."""
    if options.push is not None:
        require_hub_token()


def export_hub(job: ExportJob, out: Path) -> ExportReport:
    """Write the folder, and upload it where ``push`` names a repository."""
    copy_run(job, out)
    name = job.options.push or f"USER/{job.run.name}"
    (out / "README.md").write_text(_card(job, name), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    facts: dict[str, Any] = {"bytes": size, "towers": _tower_names(job)}
    lines = [f"{size / 1e6:.1f} MB; loads with clasp.load(FOLDER), or with clasp.load('hf:{name}') when it is uploaded"]
    if job.options.push is not None:
        facts["address"] = push_run(out, job.options.push)
        lines.append(f"uploaded to {facts['address']}")
    return ExportReport(lines, facts)


def copy_run(job: ExportJob, out: Path) -> None:
    """Copy what ``clasp.load`` reads, with the towers that are folders of this machine."""
    for name in _COPIED:
        source = job.run / name
        if source.is_dir():
            shutil.copytree(source, out / name)
        elif source.exists():
            shutil.copy2(source, out / name)
    base = json.loads((job.run / "base.json").read_text(encoding="utf-8"))
    recipe: dict[str, Any] = job.recipe.to_dict()
    for section, key in _PATHS:
        value = recipe.get(section, {}).get(key)
        if isinstance(value, str) and "/" in value and "://" not in value and not value.startswith("sample:"):
            recipe[section][key] = Path(value).name
    for side in ("image", "text"):
        recipe[side]["tower"] = base[side]["tower"] = _place_tower(job.run, recipe[side]["tower"], side, out)
    checked = recipe_from_dict(recipe, "the exported recipe")
    text = checked.to_toml()
    (out / "recipe.toml").write_text(text, encoding="utf-8")
    base |= {RECIPE_HASH: hash_file(out / "recipe.toml"), RECIPE_SETTINGS: tomllib.loads(text)}
    (out / "base.json").write_text(json.dumps(base, indent=1), encoding="utf-8")


def _place_tower(run: Path, tower: str, side: str, out: Path) -> str:
    """The tower as the exported recipe names it; a folder outside of the run is copied."""
    if not tower.startswith("file:"):
        return tower
    folder = Path(os.path.expanduser(tower.removeprefix("file:")))
    inside = run / "towers"
    if folder.is_relative_to(inside):
        return f"file:{RUN_PLACEHOLDER}/towers/{folder.relative_to(inside)}"
    target = out / "towers" / side
    if folder.is_dir():
        shutil.copytree(folder, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder, target)
    return f"file:{RUN_PLACEHOLDER}/towers/{side}"


# --- the card --------------------------------------------------------------------------------------------------------


def _tower_names(job: ExportJob) -> dict[str, str]:
    towers = {"image": job.recipe.image.tower, "text": job.recipe.text.tower}
    return {side: "a folder in towers/" if name.startswith("file:") else name for side, name in towers.items()}


def _card(job: ExportJob, name: str) -> str:
    names, recipe = _tower_names(job), job.recipe
    bases = [tower.partition(":")[2] for tower in names.values() if tower.startswith(("hf:", "clip:"))]
    tags = ["clasp", "clip", "image-text-retrieval", "zero-shot-image-classification", "parameter-efficient"]
    head: dict[str, Any] = {"library_name": "clasp", "license": "other", "license_name": "see-base-models"}
    head |= {"pipeline_tag": "zero-shot-image-classification", "tags": tags}
    head |= {"base_model": bases} if bases else {}
    counts = job.encoder.parameter_counts()["model"]
    results = latest_results(read_results(job.run))
    sections = "".join(results_section("Results", table) for table in result_tables(results)) if results else ""
    return f"""---
{_yaml(head)}---

# {job.run.name}

An image–text model aligned with clasp: image tower `{names["image"]}`, text tower `{names["text"]}`, one embedding
space of {recipe.head.width} dimensions. {counts.trained:,} of {counts.total:,} parameters were trained
({counts.percent:.2f} %): `delta.safetensors` holds these only, and the base weights are checked against `base.json`.

```python
import clasp

model = clasp.load("hf:{name}")
model.similarity(model.encode_image(["a.jpg"]), model.encode_text(["a caption"]))
```

The licences of both base models apply to the combination; this card does not replace them.
{sections}"""


def _yaml(head: Mapping[str, Any]) -> str:
    """Front matter: JSON strings are YAML strings."""
    lines = []
    for key, value in head.items():
        items = [f"- {json.dumps(each)}" for each in value] if isinstance(value, list) else []
        lines += [f"{key}:", *items] if items else [f"{key}: {json.dumps(value)}"]
    return "\n".join(lines) + "\n"
