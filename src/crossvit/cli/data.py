"""The verbs of `crossvit data`: look at the images before training on them, and put them into shards."""

from __future__ import annotations

from typing import Any

from cyclopts import App

from crossvit.cli.flag import Switch
from crossvit.text import json_line

app = App(name="data")  # its help is in verbs.py, which loads this when it is called


@app.command
def check(data: str, /, *, report: str | None = None, json: Switch = False) -> int:
    """Open every image and say what is there and what is wrong: classes and sizes, broken files, the same or nearly the same
    image twice, images on both sides of the split, and the same image under two labels. Changes nothing.

    Parameters
    ----------
    data
        As for `train`: a folder, a CSV, a folder of shards, or `digits`.
    report
        Write a page with the pairs as pictures to this file.
    json
        Print one JSON object on stdout.
    """
    from pathlib import Path

    import crossvit.data.check as checking
    from crossvit.cli.progress import counting
    from crossvit.cli.terminal import print_data_check
    from crossvit.data.sources import open_data
    from crossvit.files import write_atomically
    from crossvit.report.page import data_page
    from crossvit.results import to_json

    with counting("checking") as progress:
        found = checking.check(open_data(data), progress=progress, pictures=report is not None)
    if report is not None:
        write_atomically(Path(report), data_page(found).encode("utf-8", "surrogateescape"))
    if json:
        _print_json(to_json(found))
    else:
        print_data_check(found)
        if report is not None:
            print(f"page     {report}")
    return 0


@app.command
def shard(
    data: str, out: str, /, *, shard_mb: int = 256, overwrite: Switch = False, json: Switch = False
) -> int:
    """Write the images into tar files with a manifest, to train from in place of the folder: few large files for slow disks
    and network storage. webdataset reads the tar files too.

    Parameters
    ----------
    data
        As for `train`.
    out
        The folder to make; it may be remote, such as s3://bucket/photos, where fsspec's package for it is installed.
    shard_mb
        About how large each tar file is to be, in MB.
    overwrite
        Replace the shards in `out`.
    json
        Print one JSON object on stdout.
    """
    from crossvit.cli.progress import counting
    from crossvit.data.shard_writing import write_shards
    from crossvit.data.sources import open_data
    from crossvit.errors import UsageError
    from crossvit.results import to_json

    if shard_mb < 1:
        raise UsageError(f"shard_mb = {shard_mb}: should be 1 or more")
    with counting("writing") as progress:
        summary = write_shards(
            open_data(data),
            out,
            shard_bytes=shard_mb * 10**6,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        _print_json(to_json(summary))
    else:
        files = f"{summary.shards} tar file{'s' * (summary.shards != 1)}"
        print(
            f"{summary.images:,} images in {files} of {summary.bytes / 1e6:.1f} MB in all: crossvit train {summary.location}"
        )
    return 0


def _print_json(record: dict[str, Any]) -> None:
    print(json_line(record))
