"""What every test runs under: ``precision = "auto"`` is float32, and packaged towers are converted once a machine.

Fixtures for the ``conftest.py`` of each folder of tests. Note: nothing of clasp is imported before its types are
checked, nor by the process that only hands out the files.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import shape_checks

shape_checks.install()


@pytest.fixture(scope="session", autouse=True)
def float32_by_default() -> Iterator[None]:
    """``precision = "auto"`` is float32, on machines where bfloat16 is faster, too: what is tested is exact."""
    from clasp.models import precision
    from clasp.models.precision import PrecisionChoice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_detect", lambda kind: PrecisionChoice("float32", "the tests compute in float32"))
        yield


@pytest.fixture(scope="session", autouse=True)
def converted_towers() -> Iterator[None]:
    """Packaged towers are converted into this machine's cache, not once for each test that has a cache of its own."""
    from clasp.data.cache_folder import cache_folder
    from clasp.models.zoo import converted_weights

    folder = cache_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converted_weights, "cache_folder", lambda: folder)
        yield
