from __future__ import annotations

from pathlib import Path

import pytest

from edadm.errors import EdadmError
from edadm.records import write
from edadm.report.diff import ABSENT, differences, flatten, locate, render_diff
from tests.report.records_for_tests import record


def test_flatten_names_leaves_by_their_path() -> None:
    sites = [{"name": "conv_in", "kind": "weight", "bits": 8}, {"name": "conv_in", "kind": "act", "bits": 4}]
    found = flatten({"a": {"b": 1, "c": [1, 2]}, "sites": sites, "empty": {}})
    assert found["a.b"] == 1
    assert found["a.c"] == [1, 2]
    assert found["sites.conv_in[act].bits"] == 4
    assert found["empty"] == {}


def test_differences_are_those_and_only_those() -> None:
    a = record(config={"lr": 1e-3}, hash="a" * 16)
    b = record(config={"lr": 1e-2, "warmup": 0.2}, hash="b" * 16)
    assert differences(a, b) == [
        ("hash", "a" * 16, "b" * 16),
        ("config.lr", 1e-3, 1e-2),
        ("config.warmup", ABSENT, 0.2),
    ]
    assert "| config.lr " in render_diff(a, b)
    assert "equal" in render_diff(a, a)


def test_long_values_are_cut() -> None:
    text = render_diff(record(reason="x" * 500, status="failed"), record())
    assert "…" in text
    assert max(map(len, text.splitlines())) < 200


def test_records_are_found_by_prefix_and_path(tmp_path: Path) -> None:
    a, b = record(hash="ab" + "0" * 14), record(hash="ac" + "0" * 14)
    assert locate("ab", [a, b]) == a
    assert locate(str(write(b, tmp_path)), []) == b
    with pytest.raises(EdadmError, match="begins 2 hashes"):
        locate("a", [a, b])
    with pytest.raises(EdadmError, match="no record 'ff'"):
        locate("ff", [a, b])
