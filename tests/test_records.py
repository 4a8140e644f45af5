from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from lewm import records


@dataclass(frozen=True)
class Inner:
    low: float
    names: list[str]


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner
    pair: tuple[int, float]
    by_name: dict[str, bool]
    note: str | None = None


def outer(value):
    return records.typed("the file", value, Outer)


GOOD = {"count": 3, "inner": {"low": 1, "names": ["a"]}, "pair": [1, 2.5], "by_name": {"x": True}}


def test_plain_data_become_what_the_annotations_say(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD))
    found = records.read_record(path, "thing", "thing of ours", outer)
    assert found == Outer(3, Inner(1.0, ["a"]), (1, 2.5), {"x": True}, None)
    assert type(found.inner.low) is float


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 3.0}, "count"),
        ({"count": True}, "count"),
        ({"inner": {"low": float("nan"), "names": []}}, "low"),
        ({"inner": {"low": 1.0, "names": [1]}}, "names"),
        ({"inner": []}, "inner"),
        ({"pair": [1]}, "pair"),
        ({"by_name": {"x": 1}}, "by_name"),
        ({"note": 5}, "note"),
        ({"more": 1}, "more"),
    ],
)
def test_other_types_are_refused_by_name(tmp_path, change, named):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=rf"thing: .*a\.json is no thing of ours \(.*{named}"):
        records.read_record(path, "thing", "thing of ours", outer)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"\\ud800', "1e999"])
def test_what_is_no_such_json_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="thing: .* is no thing of ours"):
        records.read_record(path, "thing", "thing of ours", outer)


def test_files_that_are_missing_or_too_large_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="thing: no such file"):
        records.read_record(tmp_path / "none.json", "thing", "thing of ours", outer)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD))
    monkeypatch.setattr(records, "LARGEST", 10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        records.read_record(path, "thing", "thing of ours", outer)
