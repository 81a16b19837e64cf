"""run.json as a record: every version's file loads, today's is written back as it was, damage is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from crossvit.errors import RunError
from crossvit.results import ResultRecord, RunRecord, to_json
from crossvit.run import Run
from crossvit.trained import open_trained

FIXTURES = Path(__file__).parents[1] / "fixtures"
TODAY = ("run_today", "run_today_multi_label", "run_today_stopped")


def stored(name: str) -> dict[str, Any]:
    """Returns run.json of a fixture."""
    return json.loads((FIXTURES / name / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["run_schema_1", *TODAY])
def test_every_key_is_an_attribute_of_the_same_name(name: str) -> None:
    values = stored(name)
    record = Run(FIXTURES / name).record()
    written = record.to_dict()
    assert record.extra == {}
    for key, value in values.items():
        if key == "data":  # the first runs had no warnings
            assert written[key] == {"warnings": [], **value}
            assert record.data.held_out == value["held_out"]
            assert record.data.notes == tuple(value["notes"])
        elif key == "result":
            assert (record.result and written[key]) == value
        else:
            read = getattr(record, key)
            assert (list(read) if isinstance(read, tuple) else read) == value


@pytest.mark.parametrize("name", TODAY)
def test_what_is_written_back_is_the_same_file(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_record(Run(FIXTURES / name).record())
    assert run.record_path.read_bytes() == (FIXTURES / name / "run.json").read_bytes()


def test_a_run_of_the_first_schema_has_todays_defaults() -> None:
    record = Run(FIXTURES / "run_schema_1").record()
    assert (record.task, record.kernels, record.processes) == ("single-label", False, 1)
    assert (record.given, record.temperature, record.thresholds) == (None, None, None)
    assert record.data.warnings == ()
    assert record.result == ResultRecord(top1=0.5, n=12, loss=1.0986, seconds=1.0)
    assert list(record.to_dict()) == [
        key for key in stored("run_today_stopped") if key not in ("given",)
    ]


def test_a_run_with_a_temperature_is_opened_with_it() -> None:
    assert open_trained(FIXTURES / "run_today").temperature == stored("run_today")["temperature"]
    several = open_trained(FIXTURES / "run_today_multi_label")
    assert list(several.thresholds) == stored("run_today_multi_label")["thresholds"]


def test_held_out_images_recorded_by_name_alone_are_known_by_name() -> None:
    """As the very first runs have them: no sizes, no notes."""
    values = stored("run_schema_1")
    values["data"] = {**values["data"], "held_out": ["0/a.png"]}
    del values["data"]["notes"]
    record = RunRecord.from_dict(values)
    assert list(record.data.held_out) == ["0/a.png"]
    assert record.data.notes == ()


def test_keys_of_a_later_version_are_kept(tmp_path: Path) -> None:
    values = stored("run_today_stopped")
    values |= {"later": [1, 2]}
    values["data"]["later"] = "yes"
    (tmp_path / "run.json").write_text(json.dumps(values))
    run = Run(tmp_path)
    run.amend(temperature=2.0)
    written = json.loads(run.record_path.read_text())
    assert (written["later"], written["data"]["later"]) == ([1, 2], "yes")
    assert written["temperature"] == 2.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": "crab"}, "classes is 'crab'"),
        ({"classes": [1, 2]}, r"classes is '\[1, 2\]'"),
        ({"threads": "two"}, "threads is 'two'"),
        ({"kernels": 1}, "kernels is '1'"),
        ({"config": []}, r"config is '\[\]'"),
        ({"result": 0.5}, "result is '0.5'"),
        ({"result": {"top1": 0.5}}, r"no result\.n, result\.loss, result\.seconds"),
        ({"result": {"top1": "x", "n": 1, "loss": 0, "seconds": 1}}, r"result\.top1 is 'x'"),
        ({"data": {"location": "digits"}}, r"no data\.fingerprint, data\.train"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"schema": "1"}, "no schema"),
    ],
)
def test_a_damaged_value_is_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(stored("run_today") | change))
    with pytest.raises(RunError, match=rf"run\.json is damaged \({says}") as error:
        Run(tmp_path).record()
    assert str(error.value).endswith("): train again with --overwrite")


def test_a_newer_schema_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    newer = stored("run_today") | {"schema": 2, "crossvit": "9.0"}
    with pytest.raises(RunError, match=r"was made by a newer crossvit \(9\.0\): upgrade crossvit"):
        RunRecord.from_dict(newer, path=tmp_path / "run.json")


def test_a_record_is_frozen_and_becomes_json_as_the_file_has_it() -> None:
    record = Run(FIXTURES / "run_today").record()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.model = "another"  # type: ignore[misc]
    assert to_json(record) == stored("run_today")
