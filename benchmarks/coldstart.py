"""The first prediction of one PNG, from the shell: a process that starts, loads a model, reads the picture and says a class.

`crossvit predict` with torch and with ONNX Runtime against the same model in a script of timm's and in a script of ONNX
Runtime, Pillow and NumPy alone. Byte code, disk cache, the exported file and our kernel are there from a first run that is
not counted. `--rounds N` and `--model NAME` choose.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SETUP = """
import sys
from pathlib import Path
import timm, torch
import crossvit
from crossvit.run import Run
from crossvit.trained import open_trained, paper_preprocessing
from crossvit.runtimes.onnx import export
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
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(picture)
        environment = {**os.environ, "CROSSVIT_CACHE": f"{folder}/cache"}
        subprocess.run([sys.executable, "-c", SETUP, options.model, folder], check=True, env=environment)
        predict = ["-m", "crossvit", "predict", f"{folder}/run", str(picture), "--top-k", "1", "--engine"]
        commands = {
            "crossvit predict, torch": [*predict, "torch"],
            "crossvit predict, onnxruntime": [*predict, "onnxruntime"],
            "timm in a script": ["-c", TIMM, options.model, folder, str(picture)],
            "ONNX Runtime in a script": ["-c", ONNX_RUNTIME, options.model, folder, str(picture)],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds + 1):
            for name, arguments in commands.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
                times[name].append(time.perf_counter() - started)
        for name, found in times.items():
            kept = found[1:]
            spread = f"{min(kept):.2f} to {max(kept):.2f}"
            print(f"{name:32} {statistics.median(kept):.2f} s ({spread}); the first of all {found[0]:.2f} s")


if __name__ == "__main__":
    main()
