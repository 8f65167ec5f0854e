"""How the tests run: Ctrl-C reaches those that press it, the longest begin first, and imports are not looked at again.

Ctrl-C is ignored where a shell started them in the background. Files are handed to processes in their order, so that
nothing long is left for one process at the end. Python's collector of cycles begins once all is imported, and comes
less often than usual.
"""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from exactness import converted_towers, float32_by_default

__all__ = ["converted_towers", "float32_by_default"]

LONGEST = (
    "test_demo.py",
    "test_train.py",
    "test_one_selection.py",
    "test_doctor.py",
    "test_auto.py",
    "test_retention.py",
    "test_cli.py",
    "test_lilt_recipes.py",
    "test_families.py",
    "test_cached_training.py",
    "test_initialize.py",
    "test_run_folder.py",
    "test_distributed.py",
    "test_from_scratch.py",
)

gc.disable()  # until all is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def seed_without_devices() -> Iterator[None]:
    """``torch.manual_seed`` keeps the stack of each call for every kind of device that is not there: a millisecond."""
    import torch  # not for the process that only hands out the files

    with pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():
            patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws does not depend on the tests before it in its process."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both toy towers, ``FOLDER/image`` and ``FOLDER/text``; a test that changes them saves its own."""
    from toyruns import save_towers

    return save_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 pairs of the toy world; a test that changes them writes its own."""
    from toydata import toys, write_csv

    return write_csv(toys(80), tmp_path_factory.mktemp("pairs"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    gc.freeze()  # the libraries' hundred thousands of objects are here to stay
    gc.enable()
    gc.set_threshold(10_000)  # from 700: a tenth of the tests' time went into collecting
