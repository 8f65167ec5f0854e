"""Runs a cell: trained by ``clasp.commands.train``, evaluated, and recorded with its FLOPs and speed.

Input: a ``Cell`` and the ``World``. Output: its record, one line in ``results``. Pairs per second are those of the
run's median step; for a timing cell they are the result, and the machine should be otherwise idle.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from studies.records import Record, Results, machine
from studies.sharing.datasets import World
from studies.sharing.grid import Cell

from clasp.commands.run_context import Preloaded
from clasp.commands.train import train_recipe
from clasp.config.build import build_feature_source, build_model_and_preprocessing
from clasp.data.readers import PairIndex
from clasp.models.dual_encoder import DualEncoder
from clasp.training.cost.flops import count_macs

TOKENS = 8  # caption length for counting FLOPs, about the mean of the pairs


def run(cell: Cell, world: World, results: Results) -> Record:
    """Train, evaluate (if that is the purpose) and record."""
    recipe = cell.recipe
    pairs = world.pairs(cell.steps * int(recipe.train.batch_size), cell.seed)
    parts = build_model_and_preprocessing(recipe, lambda: PairIndex(pairs[0]).texts)
    with tempfile.TemporaryDirectory() as folder:
        done = train_recipe(recipe, Path(folder) / "run", say=lambda line: None, preloaded=Preloaded(pairs, parts))
        if done.fitted.interrupted:
            raise KeyboardInterrupt  # clasp saves an interrupted run; a cell always starts from scratch
        log = [json.loads(line) for line in (done.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    session, model, inputs = done.cost.sessions[-1], parts.model.eval(), build_feature_source(parts, recipe)
    began = time.perf_counter()
    record: Record = {
        "key": cell.key,
        **{"row": cell.row.name, "rate": cell.rate, "steps": cell.steps, "seed": cell.seed, "purpose": cell.purpose},
        "recipe": recipe.to_dict(),
        "different_pairs": world.different,
        "counts": {part: asdict(count) for part, count in model.parameter_counts().items()},
        "macs": macs(model, parts.transform.size),
        "pairs_per_second": session.pairs_per_second,
        "losses": [round(line["loss"], 4) for line in log if line["event"] == "step"],
    }
    if cell.purpose == "ask":
        record["answers"] = world.ask(model, inputs)
    if cell.purpose == "ask" and cell.seed == 0:
        record["validation"] = world.validate(model, inputs)
    record["seconds"] = {"train": round(session.seconds["training"], 1), "ask": round(time.perf_counter() - began, 1)}
    record["machine"] = machine()
    results.add("cells", record)
    return record


def macs(model: DualEncoder, size: int) -> int:
    """Multiply-accumulates of a forward pass of an image and a caption of ``TOKENS`` tokens, heads included."""
    device = next(model.parameters()).device
    ids = torch.ones(1, TOKENS, dtype=torch.long, device=device)
    pixels = torch.zeros(1, 3, size, size, device=device)
    return count_macs(lambda: (model.encode_image(pixels), model.encode_text(ids, ids.bool())))
