"""What an error says that an option that names a column can be."""

from __future__ import annotations

import pytest

from clasp.data.formats.sources import FileSource
from clasp.evaluation.class_labels import column_choices
from clasp.types import Pair


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"year": 1, "kind": "a"}, "label= one of: year, kind"),
        ({}, "there is no column that label= could name"),
    ],
)
def test_the_columns_that_an_option_can_name(meta: dict[str, object], said: str):
    assert column_choices("label", Pair("p0", FileSource("p0.png"), (), "p0", meta)) == said
