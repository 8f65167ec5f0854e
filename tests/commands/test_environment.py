"""What is set for the whole process: never what the user has set, and nothing that an import does by itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import clasp


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    clasp.configure_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in os.environ, "it would be stronger"


def test_the_command_settles_before_torch_and_an_import_does_not():
    program = "import os, sys, {module}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if "OMP" not in key}
    said = [
        subprocess.run(
            [sys.executable, "-c", program.format(module=module)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout.split()
        for module in ("clasp.cli.app", "clasp")
    ]
    assert said == [["3000", "False"], ["None", "False"]]
