"""The type of an option that is on when it is given: `--json`, without a `--no-json` beside it."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Switch = Annotated[bool, Parameter(negative=())]
