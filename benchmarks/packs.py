"""Images for the benchmarks: a folder, or the name of an image pack."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKS = Path(os.environ.get("CROSSVIT_DATA_PACKS", Path(__file__).parents[2] / "shared" / "data"))


@contextlib.contextmanager
def unpacked(data: str) -> Iterator[Path]:
    """The folder `data`, or where there is none the pack of that name, unpacked until the end of the block; exit status 2 if
    there is neither."""
    archive = PACKS / f"{data}.zip"
    if Path(data).expanduser().exists():
        yield Path(data).expanduser()
    elif archive.is_file():
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)
            yield Path(folder)
    else:
        print(
            f"no folder {data} and no image pack {archive}: give a folder of class folders, or set CROSSVIT_DATA_PACKS to the "
            f"folder that has the packs",
            file=sys.stderr,
        )
        sys.exit(2)
