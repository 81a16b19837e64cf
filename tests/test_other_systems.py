"""The package where POSIX is not: on a pretended Windows, since there is none to run the tests on.

A process of its own has no POSIX-only module, calls that fail as they do there, and starts other
processes anew (`spawn`). It imports every module and goes from images to predictions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PRETEND = """
import builtins, importlib.abc, io, os, shutil, signal, sys

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "syslog")

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in MODULES:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
for module, names in (
    (os, ("fork", "O_CLOEXEC", "O_DIRECTORY", "sched_getaffinity", "getpgid", "killpg", "setsid")),
    (signal, ("pthread_sigmask", "SIGKILL", "SIGHUP")),
):
    for name in names:
        delattr(module, name)

shutil._use_fd_functions = False  # which open folders
real_open, real_os_open = io.open, os.open
opened = []  # files that this process has open

def open_and_note(file, *args, **kwargs):
    stream = real_open(file, *args, **kwargs)
    if isinstance(file, (str, os.PathLike)):
        opened.append((os.path.realpath(file), stream))
    return stream

def refuse_open(path):
    opened[:] = [(name, stream) for name, stream in opened if not stream.closed]
    if os.path.realpath(path) in [name for name, _ in opened]:
        raise PermissionError(13, "The process cannot access the file", str(path))

def guarded(real, count):
    def call(*paths, **kwargs):
        if not kwargs:  # those relative to a folder's descriptor are not of Windows
            for path in paths[:count]:
                refuse_open(path)
        return real(*paths, **kwargs)
    return call

def os_open(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_os_open(path, *args, **kwargs)

builtins.open = io.open = open_and_note
os.open = os_open
os.replace, os.rename = guarded(os.replace, 2), guarded(os.rename, 2)
os.unlink = os.remove = guarded(os.unlink, 1)
"""
SCRIPT = """
import importlib, multiprocessing, pkgutil, sys
import crossvit

def main():
    multiprocessing.set_start_method("spawn")
    for module in pkgutil.walk_packages(crossvit.__path__, "crossvit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from crossvit.cli import run
    data, out = sys.argv[1:]
    tiny = ["--model", "crossvit_pico_32", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]
    train = ["train", data, "--out", out, *tiny, "--workers", "1", "--every", "1 epochs"]
    assert run([*train, "--epochs", "1"]) == 0
    assert run([*train, "--epochs", "1", "--resume"]) == 0
    assert run([*train, "--epochs", "1", "--overwrite"]) == 0
    assert run(["evaluate", out, data, "--calibrate", "--report", f"{out}/../page.html"]) == 0
    for name in ("out.csv", "out.jsonl"):
        assert run(["predict", out, data, "--out", f"{out}/../{name}"]) == 0
    print("all done")

if __name__ == "__main__":
    main()
"""


def test_it_goes_from_images_to_predictions_without_posix(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(24):
        folder = tmp_path / "data" / ("dark", "light")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 100 * (
            (index % 2) ^ (index % 3 == 0)
        )  # a third is mislabelled
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "sitecustomize.py").write_text(PRETEND)  # run first, in every process
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [
            sys.executable,
            str(tmp_path / "script.py"),
            str(tmp_path / "data"),
            str(tmp_path / "run"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "all done"
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ""))
    assert left == ["out.csv", "out.jsonl", "page.html", "script.py", "sitecustomize.py"]
