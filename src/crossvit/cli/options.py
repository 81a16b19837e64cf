"""The options of `crossvit train`: one for every field of a recipe, made from the fields themselves."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

from cyclopts import Group, Parameter

from crossvit.train.recipe import Recipe, fields

_TITLES = {"": "Options", "checkpoints": "Checkpoints and early stopping"}
_GIVEN_OTHERWISE = ("data", "out")


def _option(table: str, field: dataclasses.Field[Any], kind: Any) -> tuple[str, Any, Any]:
    default = field.default
    shown = "" if default in (None, "", (), False) else f" [default: {default}]"
    switch = kind is bool
    parameter = Parameter(
        help=f"{field.metadata['help']}{shown}",
        group=_GROUPS[table],
        show_default=False,
        negative=None if switch else (),
        consume_multiple=True,
    )
    return field.name, Annotated[kind | None, parameter], dataclasses.field(default=None)


def _kinds() -> dict[str, Any]:
    """Field name -> its type, over all tables."""
    kinds: dict[str, Any] = {}
    for hints in (typing.get_type_hints(Recipe), *map(typing.get_type_hints, _TABLES.values())):
        kinds |= hints
    return kinds


_TABLES: dict[str, Any] = {"": Recipe} | {
    field.name: type(field.default)
    for field in dataclasses.fields(Recipe)
    if dataclasses.is_dataclass(field.default)
}

_KINDS = _kinds()
_GROUPS = {
    table: Group(_TITLES.get(table, table.capitalize()), sort_key=index)
    for index, table in enumerate(_TABLES)
}

TrainingOptions: Any = dataclasses.make_dataclass(
    "TrainingOptions",
    [
        _option(table, field, _KINDS[name])
        for table, name, field in fields()
        if name not in _GIVEN_OTHERWISE
    ],
    kw_only=True,
    namespace={
        "__module__": __name__,
        "__doc__": "Every field of a recipe, None where it is not given.",
    },
)
