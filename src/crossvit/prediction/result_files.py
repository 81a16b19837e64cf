"""Files of predictions that grow a batch at a time and can be gone on with after a kill: JSON Lines, CSV, Parquet.

    results.jsonl             one object a line
    results.csv               one row an image, the surest classes side by side
    results.parquet/          part-00001.parquet, ...: a folder that pandas and pyarrow read as one table
    results.parquet.part-00002.jsonl   while it grows: what is to become the next part

A batch is appended in one write. What a kill leaves is whole rows and at most one torn at the end, which `rows` does not give.
A Parquet file has its index at its end, so one that is still growing could not be read: therefore parts, each written whole or
not at all, and between them the rows wait in a file of JSON Lines.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from crossvit.errors import RunError, UsageError
from crossvit.files import lock, write_atomically, writing
from crossvit.results import Prediction, plain_name, to_json

ROWS_A_PART = 8192  # of a Parquet file, about: 1 MB, large enough to read fast, small enough to hold in memory
LABEL_SEPARATOR = "; "  # of the classes of a multi-label model, in a cell of CSV


class Row(NamedTuple):
    """One result that is whole in a file: its image, what became of it, and the position after it, for `cut`."""

    image: str
    failed: bool
    abstained: bool
    end: int


class ResultFile(Protocol):
    """Results on disk, in the order of their images. Held for one process by a lock that a kill lets go."""

    def is_blank(self) -> bool:
        """Whether there is nothing at all."""

    def rows(self) -> Iterator[Row]:
        """The results that are there, from the first to the last whole one."""

    def cut(self, end: int) -> None:
        """Drop what comes after position `end`, 0 or that of a row."""

    def clear(self) -> None:
        """Drop everything, readable or not."""

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add results. RunError if they cannot be written."""

    def finish(self) -> None:
        """Nothing more will come."""

    def close(self) -> None:
        """Let go of the file."""


def open_results(path: Path, *, top_k: int, multi_label: bool, batch_size: int) -> ResultFile:
    """The file or folder of results at `path`, made empty if there is none. Its ending says which kind it is.

    UsageError for another ending, something else of that name, or Parquet without pyarrow; RunError if it cannot be written, or
    another process writes to it.
    """
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv", ".parquet"):
        raise UsageError(f"--out {path}: the name should end in .jsonl, .csv or .parquet")
    if path.exists() and not (path.is_dir() if kind == ".parquet" else path.is_file()):
        fix = (
            "Parquet is written as a folder of parts"
            if kind == ".parquet"
            else f"{kind} is written as a file"
        )
        raise UsageError(f"--out {path} is something else already ({fix}): choose another name")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == ".csv":
            return Csv(path, top_k=top_k, multi_label=multi_label)
        if kind == ".jsonl":
            return JsonLines(path, multi_label=multi_label)
        return ParquetParts(
            path,
            multi_label=multi_label,
            rows_a_part=batch_size * max(1, ROWS_A_PART // batch_size),
        )


def record_of(prediction: Prediction, *, multi_label: bool) -> dict[str, Any]:
    """A result as one object: the answer first, then the surest classes with their probabilities."""
    if multi_label:
        answer: dict[str, Any] = {"labels": [label.label for label in prediction.labels]}
    else:
        surest = prediction.top[0].probability if prediction.top else None
        answer = {
            "label": prediction.label,
            "probability": surest,
            "abstained": prediction.abstained,
        }
    error = None if prediction.error is None else plain_name(prediction.error)
    return {
        "image": plain_name(prediction.image),
        **answer,
        "error": error,
        "top": to_json(prediction.top),
    }


class _Appended:
    """A file that is only appended to and cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path)
        self._file = path.open("ab")

    def is_blank(self) -> bool:
        return self.path.stat().st_size == 0

    def cut(self, end: int) -> None:
        with writing(self.path):
            self._file.truncate(end)

    def clear(self) -> None:
        self.cut(0)

    def _write(self, content: str) -> None:
        with writing(self.path):
            self._file.write(content.encode("utf-8"))
            self._file.flush()

    def finish(self) -> None:
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been said
            self._file.close()
        self._lock.close()


class JsonLines(_Appended):
    """One object a line: image, label, probability, abstained (or labels), error, top."""

    def __init__(self, path: Path, *, multi_label: bool) -> None:
        super().__init__(path)
        self._multi_label = multi_label

    def rows(self) -> Iterator[Row]:
        for record, end in self.records():
            yield Row(
                record["image"], record["error"] is not None, record.get("abstained", False), end
            )

    def records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """(object, position after it) of each whole line."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                end += len(line)
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:  # a power cut can leave zeros
                    return
                if not isinstance(record, dict) or not {"image", "error"} <= record.keys():
                    return
                yield record, end

    def append(self, predictions: Sequence[Prediction]) -> None:
        self._write(
            _json_lines(
                record_of(prediction, multi_label=self._multi_label) for prediction in predictions
            )
        )


class Csv(_Appended):
    """One row an image: image, label, probability, abstained (or labels), error, then top_1, probability_1, top_2, ..."""

    def __init__(self, path: Path, *, top_k: int, multi_label: bool) -> None:
        super().__init__(path)
        self._multi_label = multi_label
        answer = ("labels",) if multi_label else ("label", "probability", "abstained")
        top = (
            f"{what}_{place}" for place in range(1, top_k + 1) for what in ("top", "probability")
        )
        self._columns = ("image", *answer, "error", *top)

    def rows(self) -> Iterator[Row]:
        end, line = 0, b""

        def lines() -> Iterator[str]:
            nonlocal end, line
            for line in file:
                end += len(line)
                yield line.decode("utf-8")

        with (
            self.path.open("rb") as file,
            contextlib.suppress(csv.Error, UnicodeDecodeError),
        ):  # torn within a quotation or letter
            reader = csv.reader(lines(), strict=True)
            if tuple(next(reader, ())) != self._columns:
                return
            for cells in reader:
                if len(cells) != len(self._columns) or not line.endswith(b"\n"):
                    return
                named = dict(zip(self._columns, cells, strict=True))
                yield Row(
                    named["image"], named["error"] != "", named.get("abstained") == "true", end
                )

    def append(self, predictions: Sequence[Prediction]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self.is_blank():
            writer.writerow(self._columns)
        writer.writerows(map(self._cells, predictions))
        self._write(text.getvalue())

    def _cells(self, prediction: Prediction) -> list[object]:
        record = record_of(prediction, multi_label=self._multi_label)
        top = [cell for label in record.pop("top") for cell in label.values()]
        if self._multi_label:
            record["labels"] = LABEL_SEPARATOR.join(record["labels"])
        else:
            record["abstained"] = "true" if record["abstained"] else "false"
        cells = [*record.values(), *top]
        return cells + [None] * (len(self._columns) - len(cells))


class ParquetParts:
    """A folder of Parquet files of `rows_a_part` rows each (the last has the rest). What is to become the next part waits in a
    tail of JSON Lines that has its number: a tail whose part is there already was left by a kill just after it was written."""

    def __init__(self, path: Path, *, multi_label: bool, rows_a_part: int) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise UsageError(
                f"--out {path} needs the package pyarrow: pip install 'crossvit[parquet]', or take .csv"
            ) from None
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        self.path = path
        self._multi_label = multi_label
        self._rows_a_part = rows_a_part
        path.mkdir(exist_ok=True)
        strange = [
            entry.name
            for entry in path.iterdir()
            if not entry.name.removeprefix(".").startswith("part-")
        ]
        if strange:
            raise UsageError(
                f"--out {path} holds other files than results ({strange[0]}): choose another name"
            )
        self._lock = _lock(path)
        for tail in path.parent.glob(f"{glob.escape(path.name)}.part-*.jsonl"):
            if tail != self._tail_of(len(self._parts()) + 1):
                tail.unlink()
        self._open_tail()

    def is_blank(self) -> bool:
        return not self._parts() and self._tail.is_blank()

    def rows(self) -> Iterator[Row]:
        columns = ("image", "error") if self._multi_label else ("image", "error", "abstained")
        count = 0
        for part in self._parts():
            for record in self._read(part, *columns):
                count += 1
                yield Row(
                    record["image"],
                    record["error"] is not None,
                    record.get("abstained", False),
                    count,
                )
        for row in self._tail.rows():
            count += 1
            yield row._replace(end=count)

    def cut(self, end: int) -> None:
        parts = self._parts()
        starts = list(accumulate((len(self._read(part, "image")) for part in parts), initial=0))
        while (
            parts and starts[-1] > end
        ):  # the last first, so that what a kill leaves is a beginning
            starts.pop()
            part = parts.pop()
            self._make_tail_again(part, self._read(part)[: max(0, end - starts[-1])])
        self._in_tail = end - starts[-1]
        ends = [0, *(position for _, position in self._tail.records())]
        self._tail.cut(ends[self._in_tail])
        self._make_part_if_full()  # a kill may have come just before it was made

    def clear(self) -> None:
        for part in reversed(self._parts()):
            part.unlink()
        self._tail.close()
        self._tail.path.unlink()
        self._open_tail()

    def append(self, predictions: Sequence[Prediction]) -> None:
        self._tail.append(predictions)
        self._in_tail += len(predictions)
        self._make_part_if_full()

    def finish(self) -> None:
        if self._in_tail:
            self._make_part()
        self._tail.close()
        self._tail.path.unlink(missing_ok=True)

    def close(self) -> None:
        self._tail.close()
        self._lock.close()

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def _tail_of(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part-{number:05d}.jsonl")

    def _open_tail(self) -> None:
        self._tail = JsonLines(self._tail_of(len(self._parts()) + 1), multi_label=self._multi_label)
        self._in_tail = sum(1 for _ in self._tail.records())

    def _make_part_if_full(self) -> None:
        if self._in_tail >= self._rows_a_part:
            self._make_part()
            self._open_tail()

    def _make_part(self) -> None:
        records = [record for record, _ in self._tail.records()]
        content = io.BytesIO()
        self._parquet.write_table(
            self._arrow.Table.from_pylist(records, schema=self._schema()),
            content,
            compression="zstd",
        )
        part = self.path / f"part-{len(self._parts()) + 1:05d}.parquet"
        write_atomically(part, content.getbuffer())
        self._tail.close()
        self._tail.path.unlink()

    def _make_tail_again(self, part: Path, records: Sequence[dict[str, Any]]) -> None:
        self._tail.close()
        self._tail.path.unlink()
        write_atomically(self._tail_of(len(self._parts())), _json_lines(records).encode())
        part.unlink()
        self._open_tail()

    def _read(self, part: Path, *columns: str) -> list[dict[str, Any]]:
        try:
            records: list[dict[str, Any]] = self._parquet.read_table(
                part, columns=list(columns) or None
            ).to_pylist()
        except (self._arrow.ArrowException, OSError) as error:
            raise RunError(f"{part} is damaged ({error}): start again with --overwrite") from error
        return records

    def _schema(self) -> Any:
        text, number = self._arrow.string(), self._arrow.float64()
        answer = (
            [("labels", self._arrow.list_(text))]
            if self._multi_label
            else [("label", text), ("probability", number), ("abstained", self._arrow.bool_())]
        )
        top = self._arrow.list_(self._arrow.struct([("label", text), ("probability", number)]))
        return self._arrow.schema([("image", text), *answer, ("error", text), ("top", top)])


def _json_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
    )


def _lock(path: Path) -> contextlib.ExitStack:
    """Holds `path` for this process until it is closed, by a file beside it."""
    stack = contextlib.ExitStack()
    busy = f"{path} is being written by another process: wait for it or choose another --out"
    stack.enter_context(lock(path.with_name(f".{path.name}.lock"), busy=busy))
    return stack
