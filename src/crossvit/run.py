"""The RUN folder: what training leaves behind and every other verb reads. Standard library only.

    RUN/run.json            schema version, model config, recipe, classes, preprocessing, precision, versions, data, result
    RUN/model.safetensors   the weights
    RUN/checkpoints/        what `--resume` goes on from
    RUN/log.jsonl           one line an epoch
    RUN/report.html         the page to look at

Files are written whole or not at all. The lock is the system's, so a killed process leaves none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossvit.errors import RunError, UsageError
from crossvit.files import lock, write_atomically, writing
from crossvit.results.run_record import RunRecord


class Run:
    """A run folder. Making one of these touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.record_path = self.path / "run.json"
        self.weights_path = self.path / "model.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.log_path = self.path / "log.jsonl"
        self.report_path = self.path / "report.html"

    def exists(self) -> bool:
        return self.record_path.is_file()

    def record(self) -> RunRecord:
        """Read run.json.

        Raises:
            UsageError: If this is not a run folder.
            RunError: If the file is damaged or of a newer version.
        """
        if not self.exists():
            raise UsageError(
                f"{self.path} is not a run folder (no run.json): give one made by `crossvit train DATA --out RUN`"
            )
        try:
            values = json.loads(self.record_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(
                f"{self.record_path} is damaged ({error}): train again with --overwrite"
            ) from error
        return RunRecord.from_dict(values, path=self.record_path)

    def finished_record(self) -> RunRecord:
        """`record()` of a run whose training has ended, so that it has weights; UsageError for others."""
        record = self.record()
        if record.result is None:
            raise UsageError(
                f"{self.path} has not finished training: go on with `crossvit train ... --out {self.path} --resume`"
            )
        return record

    def refuse_occupied(self, *, overwrite: bool) -> None:
        """UsageError if something is in the way: anything at all, or with `overwrite` anything that is not a run."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file: choose another --out")
        occupied = self.path.is_dir() and not all(
            self._is_blank(entry) for entry in self.path.iterdir()
        )
        if occupied and not self.exists():
            raise UsageError(
                f"{self.path} has files and is not a run, so it is left alone: choose another --out"
            )
        if occupied and not overwrite:
            fix = (
                "add --resume to go on with it, --overwrite to replace it, or choose another --out"
            )
            raise UsageError(f"{self.path} exists: {fix}")

    def prepare(self, record: RunRecord, *, overwrite: bool) -> None:
        """Make a run folder that holds `record` alone. UsageError if something is there already (unless `overwrite`, and it
        is a run). An old run's checkpoints go first and its weights after the new record is on disk, so that whatever
        happens between, the folder is the old run or the new one and never a mixture."""
        self.refuse_occupied(overwrite=overwrite)
        with writing(self.path):
            if self.checkpoints.is_dir():
                shutil.rmtree(self.checkpoints)
        self.write_record(record)
        with writing(self.path):
            for entry in (self.weights_path, self.log_path, self.report_path):
                entry.unlink(missing_ok=True)
        self.make_ready()

    def make_ready(self) -> None:
        """A place for checkpoints, and nothing half-written that a killed process left. Only under the lock."""
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.checkpoints):
                for partial in folder.glob(".*.partial"):
                    partial.unlink(missing_ok=True)

    @staticmethod
    def _is_blank(entry: Path) -> bool:
        """What a process that was killed before it wrote a record may have left."""
        return (
            entry.name == ".lock"
            or entry.name.endswith(".partial")
            or (entry.name == "checkpoints" and not any(entry.iterdir()))
        )

    def write_record(self, record: RunRecord) -> None:
        """Replace run.json, whole or not at all."""
        text = json.dumps(record.to_dict(), indent=1, allow_nan=False)
        write_atomically(self.record_path, f"{text}\n".encode())

    def amend(self, **fields: Any) -> None:
        """Set fields of run.json, the others staying as they are; under the lock."""
        with self.lock():
            self.write_record(dataclasses.replace(self.record(), **fields))

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        with writing(self.log_path), open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl; a last line cut short by a kill is left out."""
        entries = []
        if self.log_path.is_file():
            for line in self.log_path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    entries += [entry] if isinstance(entry, dict) else []
        return entries

    def rewrite_log(self, entries: list[dict[str, Any]]) -> None:
        write_atomically(
            self.log_path, "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing. RunError if another process does."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        busy = (
            f"{self.path} is being trained by another process: wait for it or choose another --out"
        )
        with lock(self.path / ".lock", busy=busy, leaves=True):
            yield
