"""What all records have in common: how they become JSON, and names that are in several."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from crossvit.results.run_record import RunRecord


def to_json(record: Any) -> Any:
    """A record as dicts, lists, numbers and strings, in the order of its fields, without bytes."""
    if isinstance(record, RunRecord):
        record = record.to_dict()
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        shown = (field for field in dataclasses.fields(record) if field.metadata.get("json", True))
        fields = ((field.name, getattr(record, field.name)) for field in shown)
        return {name: to_json(value) for name, value in fields if not isinstance(value, bytes)}
    if isinstance(record, np.ndarray):
        return record.tolist()
    if isinstance(record, np.generic):
        return record.item()
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record


def branch_names(count: int) -> list[str]:
    """S and L, the paper's names for its two branches; numbers otherwise."""
    return ["S", "L"] if count == 2 else [str(index) for index in range(count)]


def plain_name(name: str) -> str:
    """A file name as text that can be encoded.

    Bytes that are not UTF-8 become the escape `\\udcxx`, as JSON writes them.
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
