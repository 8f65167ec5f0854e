"""The study of the pair picker: its rank correlations by an obvious way, and the page from its records."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from studies import pair_picker


def test_the_rank_correlation_is_spearmans():
    generator = np.random.default_rng(0)
    for values in (generator.normal(size=(2, 9)), generator.integers(0, 3, (2, 9)).astype(float)):
        assert pair_picker.spearman(*values) == pytest.approx(spearmanr(*values).statistic)
    assert np.isnan(pair_picker.spearman(np.ones(4), np.arange(4.0)))


def test_the_interval_resamples_towers():
    one = np.random.default_rng(1).normal(size=(3, 3))
    other = one + np.random.default_rng(2).normal(size=(3, 3))
    generator, found = np.random.Generator(np.random.PCG64(0)), []
    for _ in range(200):
        images, texts = generator.integers(3, size=3), generator.integers(3, size=3)
        pairs = [(image, text) for image in images for text in texts]
        drawn = [[grid[pair] for pair in pairs] for grid in (one, other)]
        if all(len(set(values)) > 1 for values in drawn):
            found.append(spearmanr(*drawn).statistic)
    assert len(found) < 200, "in some, all are one pair"
    value, low, high = pair_picker.correlation_interval(one, other, resamples=200)
    assert value == pytest.approx(spearmanr(one.ravel(), other.ravel()).statistic)
    assert (low, high) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5]))) and low < value < high


def test_the_page_is_that_of_the_records():
    page = pair_picker.RECORDS.with_suffix(".md").read_text(encoding="utf-8")
    assert pair_picker.render_page(pair_picker.SETS) == page
    assert "2026-11-30, 56 px, torch 2.13.0, two cores of an AMD EPYC with bfloat16" in page


def test_a_cell_is_recorded_once_and_the_page_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another size is measured anew, and the page names the conditions of what it shows."""
    monkeypatch.setattr(pair_picker, "SIZE", 64)
    monkeypatch.setattr(pair_picker, "RECORDS", tmp_path / "records.jsonl")
    monkeypatch.setattr(pair_picker, "_measured", lambda *given: dict.fromkeys(pair_picker.PREDICTORS, 0.5))
    monkeypatch.setattr(pair_picker, "_trained", lambda *given: 0.25)
    monkeypatch.setattr(pair_picker, "correlation_interval", lambda one, other: (0.5, 0.0, 1.0))
    every = pair_picker.cells(pair_picker.QUICK)
    assert len(every) == 18 and not any(map(pair_picker.find_record, every))
    for cell in every[:12]:
        pair_picker.record(cell, pair_picker.QUICK[cell.photos], tmp_path)
    page = pair_picker.render_page(pair_picker.QUICK)
    assert ", 64 px, torch " in page and "6 of 18 cells missing: Flickr8k, heads" in page
    assert page.count("| 0.250 |") == 3 and page.count("| – |") == 6 and "ranked by" not in page
    for cell in every[12:]:
        pair_picker.record(cell, pair_picker.QUICK[cell.photos], tmp_path)
    page = pair_picker.render_page(pair_picker.QUICK)
    assert "Not complete" not in page and "| CKA | 0.50 (0.00 to 1.00) | 0.000 |" in page
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 18


def test_a_rank_correlation_is_over_the_pairs_that_are_there():
    ranks = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert pair_picker._told(ranks, [None, 0.7, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]) == ("0.98 (8 pairs)", "0.100")


def test_the_quick_form_is_printed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(pair_picker, "RECORDS", tmp_path / "records.jsonl")
    for given, written in (["--quick"], False), ([], True):
        monkeypatch.setattr(sys, "argv", ["pair_picker", *given])
        pair_picker.main()
        assert "cells missing" in capsys.readouterr().out
        assert (tmp_path / "records.md").exists() == written
