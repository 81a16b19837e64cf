"""The first prediction of one PNG, from the shell: a process that starts, loads a model, reads the picture and says a class.

`crossvit predict` with torch and with ONNX Runtime against the same model in a script of timm's and in a script of ONNX
Runtime, Pillow and NumPy alone. Of each round's four processes the order is turned by one; seconds on the clock and of the
processor, the median and in brackets the fastest and the slowest; ratios are medians over rounds, each within its own. Byte
code, disk cache, the exported file, the graph and our kernel are there from rounds that are not counted. `--rounds N` and
`--model NAME` choose.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from crossvit.hardware import physical_cores, processor, version_of

UNCOUNTED = 2  # rounds: the first makes what is kept, the second is the first to use it
ANCHORS = ("timm in a script", "ONNX Runtime in a script")

SETUP = """
import sys
from pathlib import Path
import timm, torch
import crossvit
from crossvit.run import Run
from crossvit.trained import open_trained, paper_preprocessing
from crossvit.engines.onnx_graph import export
from crossvit.weights.files import header, write_weights
from crossvit.weights.keys import to_ours

name, folder = sys.argv[1], Path(sys.argv[2])
theirs = timm.create_model(name, num_classes=10)
torch.save(theirs.state_dict(), folder / "timm.pth")
ours = crossvit.create_model(name, num_classes=10)
state = to_ours(theirs.state_dict(), ours.state_dict())
preprocessing = paper_preprocessing(name, ours.config)
classes = [f"class {index}" for index in range(10)]
run = Run(folder / "run")
record = {"crossvit": crossvit.__version__, "model": name, "config": ours.config.to_dict(), "classes": classes,
          "preprocessing": preprocessing, "recipe": {}, "data": {}, "result": {"top1": 0.1}, "threads": 1, "precision": "fp32"}
run.path.mkdir()
run.prepare(record, overwrite=False)
write_weights(run.weights_path, state, header(model=name, config=ours.config, classes=classes, preprocessing=preprocessing))
export(open_trained(run.path), folder / "model.onnx")
"""

TIMM = """
import sys
import timm, torch
from PIL import Image
model = timm.create_model(sys.argv[1], num_classes=10, checkpoint_path=sys.argv[2] + "/timm.pth").eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open(sys.argv[3]).convert("RGB"))[None])
print(int(logits.argmax()))
"""

ONNX_RUNTIME = """
import sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[2] + "/model.onnx", providers=["CPUExecutionProvider"])
size = session.get_inputs()[0].shape[-1]
pixels = np.asarray(Image.open(sys.argv[3]).convert("RGB").resize((size, size), Image.BICUBIC), dtype=np.float32) / 255
pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
(logits,) = session.run(None, {"images": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
print(int(logits.mean(0).argmax()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="crossvit_9_240")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        ).save(picture)
        environment = {**os.environ, "CROSSVIT_CACHE": f"{folder}/cache"}
        environment.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # installed packages have their byte code, and so has ours
        subprocess.run(
            [sys.executable, "-c", SETUP, options.model, folder], check=True, env=environment
        )
        predict = [
            "-m",
            "crossvit",
            "predict",
            f"{folder}/run",
            str(picture),
            "--top-k",
            "1",
            "--engine",
        ]
        commands = {
            "crossvit predict, torch": [*predict, "torch"],
            "crossvit predict, onnxruntime": [*predict, "onnxruntime"],
            "timm in a script": ["-c", TIMM, options.model, folder, str(picture)],
            "ONNX Runtime in a script": ["-c", ONNX_RUNTIME, options.model, folder, str(picture)],
        }
        rounds = [
            {name: measured(commands[name], environment) for name in turned(list(commands), index)}
            for index in range(UNCOUNTED + options.rounds)
        ]
    versions = ", ".join(
        f"{package} {version_of(package)}" for package in ("torch", "timm", "onnxruntime")
    )
    print(
        f"{options.model}, {options.rounds} rounds, {processor()}, {physical_cores()} cores, {versions}"
    )
    print(f"{'':34}{'seconds':22}{'of the processor':22}{'times ' + '    times '.join(ANCHORS)}")
    for name in commands:
        times = zip(*(one[name] for one in rounds[UNCOUNTED:]), strict=True)
        figures = "".join(
            f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})".ljust(22)
            for found in times
        )
        ratios = "".join(
            ratio(rounds[UNCOUNTED:], name, anchor).ljust(len(anchor) + 10) for anchor in ANCHORS
        )
        print(f"{name:34}{figures}{ratios}".rstrip())


def turned(names: list[str], by: int) -> list[str]:
    start = by % len(names)
    return names[start:] + names[:start]


def measured(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds on the clock and of the processor, user and system, that one process takes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def ratio(rounds: list[dict[str, tuple[float, float]]], name: str, anchor: str) -> str:
    """Of seconds and of the processor's."""
    return " / ".join(
        f"{statistics.median(one[name][kind] / one[anchor][kind] for one in rounds):.2f}"
        for kind in (0, 1)
    )


if __name__ == "__main__":
    main()
