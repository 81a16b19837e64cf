"""Does prediction into a file hold its memory, and keep the engine fed? RUN on N images, the pictures of DATA over and over.

Images a second and the process's memory after each tenth of the images; beside it a plain loop that decodes a batch and then
computes it, and the engine alone on batches that are ready.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from packs import unpacked

from crossvit.prediction.image_paths import find_images
from crossvit.prediction.predictor import Predictor
from crossvit.prediction.to_file import predict_to_file


def memory() -> float:
    """MB that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def rate(work: Callable[[], object], images: int) -> float:
    started = time.perf_counter()
    work()
    return images / (time.perf_counter() - started)


def plain_loop(predictor: Predictor, images: list[str]) -> None:
    size = predictor.batch_size
    for start in range(0, len(images), size):
        predictor.engine(
            np.stack([predictor.preprocessing(image) for image in images[start : start + size]])
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("data", help="a folder, or the name of an image pack")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument(
        "--compared",
        type=int,
        default=1_600,
        help="images of the plain loop and of the engine alone",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--kind", choices=("jsonl", "csv", "parquet"), default="jsonl")
    options = parser.parse_args()
    with unpacked(options.data) as data:
        measure(find_images([str(data)]), options)


def measure(found: list[str], options: argparse.Namespace) -> None:
    predictor = Predictor(options.run, batch_size=options.batch_size, workers=options.workers)

    def images() -> Iterator[str]:
        return islice(cycle(found), options.count)

    compared = list(islice(cycle(found), options.compared))
    plain_loop(predictor, compared[: 4 * options.batch_size])  # warm
    batch = np.stack([predictor.preprocessing(image) for image in compared[: options.batch_size]])
    repeats = max(1, options.compared // options.batch_size)
    alone = rate(lambda: [predictor.engine(batch) for _ in range(repeats)], repeats * len(batch))
    before = rate(lambda: plain_loop(predictor, compared), len(compared))
    started = time.perf_counter()
    tenths: list[tuple[int, float, float]] = []

    def progress(done: int) -> None:
        if done >= (len(tenths) + 1) * options.count // 10:
            tenths.append((done, memory(), time.perf_counter() - started))

    with tempfile.TemporaryDirectory() as folder:
        result = predict_to_file(
            predictor, images(), Path(folder) / f"out.{options.kind}", progress=progress
        )
    after = rate(lambda: plain_loop(predictor, compared), len(compared))
    print(
        f"{options.run} on {result.n:,} images of {options.data} into {options.kind}, batch {options.batch_size}"
    )
    for done, held, seconds in tenths:
        print(f"  {done:>9,} images  {held:6.0f} MB  {done / seconds:7.1f} images/s")
    plain = (before + after) / 2
    print(
        f"  predict_to_file {result.images_per_second:7.1f} images/s, {result.images_per_second / plain:.2f}x the plain loop"
    )
    print(f"  plain loop      {plain:7.1f} images/s (before {before:.1f}, after {after:.1f})")
    print(f"  engine alone    {alone:7.1f} images/s")


if __name__ == "__main__":
    main()
