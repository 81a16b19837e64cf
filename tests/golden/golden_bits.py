"""Golden bits: what training and inference give, to the last bit, on one kind of processor.

A change that only moves or renames code must change none of them. The cases use nothing but what
stays: the names that `crossvit` itself exports, the options of recipes, the files of a run and the
environment variable CROSSVIT_KERNELS.

    python tests/golden/golden_bits.py                  # compare with this machine's file
    python tests/golden/golden_bits.py --case 'run-*'   # some of the cases
    python tests/golden/golden_bits.py --write          # make the file, or the cases named in it

The exit status is 0 where all bits are the same, 1 where some differ, 2 if the call was wrong and
3 where this machine has no file. Bits depend on the processor and on torch, so there is one file
for each pair of them (see `machine_key`).

Every case is computed in a process of its own kind: "no kernels" with CROSSVIT_KERNELS=off, and
"kernels" where there are any.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import crossvit

THREADS = 2  # sums over another number of threads have other last bits
MODES = {"no kernels": {"CROSSVIT_KERNELS": "off"}, "kernels": {}}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn")
CAPABILITIES = ("avx512_f", "avx512_bf16", "amx_bf16")
PASSING = {"seconds", "images_per_second", "versions", "crossvit"}  # differ from run to run
MOST_KEYS, MOST_ITEMS = 60, 12  # of a dict or list: beyond, its digest is kept in place of it
WIDTH = 100  # columns of the file: what fits is on one line
FIXTURES = Path(__file__).parent.parent / "fixtures"
NO_FILE = 3  # exit status

Case = Callable[[], dict[str, Any]]


# ---- digests


def digest(*contents: bytes) -> str:
    """Returns the sha256 of all `contents`, one after the other."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()


def content(tensor: Tensor) -> bytes:
    """Returns the bytes of a tensor's elements in row-major order."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bits(tensor: Tensor) -> str:
    """Returns a line that changes with any bit of `tensor`, with its first numbers to look at."""
    first = " ".join(f"{value:.6g}" for value in tensor.detach().flatten()[:3].tolist())
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{digest(content(tensor))[:16]} {kind} {list(tensor.shape)}: {first}"


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Returns digests of named tensors that tell changed numbers from changed names.

    Args:
        tensors: The tensors by name. Their order counts.

    Returns:
        `in order` is of the numbers, `in any order` too but stays the same when tensors are only
        renamed or moved, and `names` is of the names and shapes. `first` is there to look at.
    """
    contents = [content(tensor) for tensor in tensors.values()]
    shapes = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    return {
        "in order": digest(*contents),
        "in any order": digest(*sorted(hashlib.sha256(own).digest() for own in contents)),
        "names": digest(shapes.encode()),
        "first": [bits(tensor) for tensor in list(tensors.values())[:3]],
    }


def plain(value: Any) -> Any:
    """Returns `value` as JSON has it, without what differs from run to run.

    Records become dicts, arrays and tensors become `bits`, encoded pictures are left out, and of
    what has very many items there is a digest.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        value = {name: getattr(value, name) for name in names}
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, dict):
        kept = {str(key): own for key, own in value.items() if key not in PASSING}
        value = {key: plain(own) for key, own in kept.items() if not isinstance(own, bytes)}
    elif isinstance(value, list | tuple):
        value = [plain(own) for own in value]
    most = MOST_KEYS if isinstance(value, dict) else MOST_ITEMS
    if isinstance(value, dict | list) and len(value) > most:
        return f"{len(value)} items: {digest(json.dumps(value).encode())[:16]}"
    return value


# ---- what the cases are made of


def write_images() -> None:
    """Writes `images/` (three classes of sixteen) and `several.csv` into the current folder.

    The pictures follow from whole numbers and are PPM files, which no library encodes otherwise.
    """
    rows, columns = np.mgrid[:24, :24]
    lines = ["path,labels"]
    for kind, name in enumerate(("bars", "rings", "waves")):
        Path("images", name).mkdir(parents=True)
        for index in range(16):
            turned = (rows - 12) ** 2 + (columns - 12) ** 2 if kind == 1 else rows * (kind + 1)
            colours = [turned * (9 + index) + columns * kind * 7 + 50 * k * index for k in range(3)]
            pixels = (np.stack(colours, axis=-1) % 256).astype(np.uint8)
            path = Path("images", name, f"{index:02d}.ppm")
            path.write_bytes(b"P6\n24 24\n255\n" + pixels.tobytes())
            shown = [name] * (index % 5 > 0) + ["odd"] * (index % 2)
            lines.append(f"{path},{';'.join(shown)}")
    Path("several.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe(out: str, data: str = "images", **changes: Any) -> crossvit.Recipe:
    """Returns the recipe of a few steps of the smallest preset, with `changes` of its options."""
    own: dict[str, Any] = {"model": "crossvit_pico_32", "epochs": 2, "batch_size": 12, "seed": 1}
    own |= {"image_size": 16, "held_out": 0.25, "precision": "fp32", "device": "cpu", "workers": 0}
    return crossvit.load_recipe("small", data=data, out=out, **own | changes)


def left_behind(out: str) -> dict[str, Any]:
    """Returns what a run folder holds: its weights, losses, record, log and checkpoints."""
    run = Path(out)
    with safe_open(run / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        weights = {name: file.get_tensor(name) for name in names}
        described = file.metadata() or {}
    record = json.loads((run / "run.json").read_text())
    if "recipe" in record and "given" in record:
        record["given"] = differences(record["recipe"], record["given"])  # much the same
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "weights": weights_of(weights),
        "described": {key: digest(described[key].encode())[:16] for key in sorted(described)},
        "losses": [float(line["loss"]).hex() for line in log],
        "record": plain(record),
        "log": plain(log),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def trained(
    out: str = "run",
    *,
    function: Callable[[Tensor], Tensor] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Trains into the folder `out`, taught by `function` if given; returns what is there then."""
    crossvit.fit(recipe(out, **changes), teacher=function)
    return left_behind(out)


def run_case(**changes: Any) -> Case:
    """Returns the case of a run with `changes` of the recipe's options."""
    return lambda: trained(**changes)


def config(
    *,
    size: int | tuple[int, int] = 60,
    patches: tuple[int, ...] = (12, 16),
    dims: tuple[int, ...] = (32, 64),
    tokeniser: str = "linear",
    class_token: bool = True,
    **changes: Any,
) -> crossvit.CrossViTConfig:
    """Returns a small configuration whose widths our kernels can take."""
    branches = tuple(
        crossvit.BranchConfig(
            patch=patch,
            dim=dim,
            heads=2,
            depth=1 + index,
            mlp_ratio=2.0,
            image_scale=0.8 if index == len(dims) - 1 else 1.0,
            tokeniser=tokeniser,
            class_token=class_token,
        )
        for index, (patch, dim) in enumerate(zip(patches, dims, strict=True))
    )
    fixed: dict[str, Any] = {"image_size": size, "branches": branches, "stages": 2}
    return crossvit.CrossViTConfig(**fixed | {"num_classes": 5} | changes)


def model_case(
    *,
    batch: int = 4,
    checkpointing: bool = False,
    other_size: tuple[int, int] | None = None,
    **changes: Any,
) -> Case:
    """Returns the case of a model that is trained for three steps, used and optimised.

    Args:
        batch: Images a step.
        checkpointing: Whether activations are computed a second time.
        other_size: Height and width of further images that the model is used on.
        changes: Of `config`.
    """

    def compute() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for precision in ("fp32", "bf16"):
            torch.manual_seed(3)
            model = crossvit.create_model(config(**changes))
            model.set_gradient_checkpointing(checkpointing)
            own = {"weights at first": weights_of(model.state_dict())["in order"]}
            channels, sizes = model.config.in_channels, [model.config.image_size, other_size]
            batches = [torch.randn(batch, channels, *size) for size in sizes if size]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                own["losses"] = train(model, batches[0])
                own["weights"] = weights_of(model.state_dict())
                own["used"] = [use(model, images) for images in batches]
            form = crossvit.optimize(model, precision=precision)
            own["optimised"] = [form(images) for images in batches]
            own["optimised, by branch"] = [form.branch_logits(images) for images in batches]
            found[precision] = plain(own)
        return found

    return compute


def train(model: crossvit.CrossViT, images: Tensor) -> list[str]:
    """Takes three steps of AdamW on `images` and returns the losses, exactly."""
    labels = torch.arange(len(images)) % model.config.num_classes
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images).float(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss).hex())
    return losses


def use(model: crossvit.CrossViT, images: Tensor) -> dict[str, Any]:
    """Returns everything that a model says of `images`, with gradients and without."""
    model.eval()
    found: dict[str, Any] = {"with gradients": model(images)}
    with torch.no_grad():
        found["logits"] = model(images)
        found["by branch"] = model.branch_logits(images)
        found["features"] = model.forward_features(images)
        found["tokens"] = model.intermediate_tokens(images)
        with crossvit.record_attention(model) as maps:
            found["logits while recorded"] = model(images)
    described = [[f"{key} {value}" for key, value in plain(own).items()] for own in maps]
    found["attention"] = {str(index): ", ".join(own) for index, own in enumerate(described)}
    return found


# ---- cases of trained runs


def resumed() -> dict[str, Any]:
    """A run that is stopped in its second epoch and gone on with, beside one never stopped."""

    def teacher(images: Tensor) -> Tensor:
        return images[:, :, 0, 0]

    def stopping(images: Tensor) -> Tensor:
        log = Path("cut", "log.jsonl")
        if log.is_file() and log.read_text():
            raise KeyboardInterrupt
        return teacher(images)

    changes: dict[str, Any] = {"epochs": 3, "drop_path": 0.3, "ema": 0.9, "mixup": 0.8}
    whole = trained("whole", function=teacher, **changes)
    try:
        crossvit.fit(recipe("cut", **changes), teacher=stopping)
        raise AssertionError("the run was not stopped")
    except KeyboardInterrupt:
        pass
    assert not Path("cut", "model.safetensors").exists()
    crossvit.fit(recipe("cut", **changes), teacher=teacher, resume=True)
    cut = left_behind("cut")
    same = all(whole[key] == cut[key] for key in ("weights", "losses", "log", "checkpoints"))
    return {"the same as one never stopped": same, "cut": cut}


def taught() -> dict[str, Any]:
    """A run each of whose branches is taught the answers of another run."""
    trained("first", epochs=1)
    return trained("second", teacher="first", distil="hard", distil_branches=True)


def begun_from_another() -> dict[str, Any]:
    """A run that starts from another's weights, of which one part stays and the best is kept."""
    trained("first", epochs=1)
    shutil.move("images/waves", "images/ripples")
    try:
        return trained(
            "second",
            model=None,
            weights="first",
            image_size=24,
            freeze=["tokens"],
            layer_decay=0.8,
            select="best",
        )
    finally:
        shutil.move("images/ripples", "images/waves")


# ---- cases of what is done with a run


def evaluated(run: str, data: str, **options: Any) -> Any:
    """Returns the figures of `run` on `data`."""
    return plain(crossvit.evaluate(run, data, engine="torch", **options))


def predicted(run: str) -> dict[str, Any]:
    """Returns what `run` says of a few pictures, with and without further views of them."""
    images = sorted(Path("images").glob("*/00.ppm"))
    found = {}
    for precision in ("fp32", "bf16"):
        for tta in ("none", "flip-zoom"):
            predictor = crossvit.Predictor(run, engine="torch", precision=precision, tta=tta)
            found[f"{precision}, {tta}"] = plain(predictor(images))
    return found


def on_digits() -> dict[str, Any]:
    """A run on the real scans inside scikit-learn, and all that can be said of it."""
    found = {"run": trained("digits", data="digits", epochs=1, batch_size=128)}
    found["evaluated"] = evaluated("digits", "digits", precision="bf16")
    found["calibrated"] = evaluated("digits", "digits", precision="fp32", calibrate=True)
    found["predicted"] = predicted("digits")
    found["explained"] = plain(crossvit.explain("digits", "images/rings/05.ppm"))
    return found


def of_before() -> dict[str, Any]:
    """Runs that are in the repository, as an earlier version wrote them."""
    shutil.copytree(FIXTURES / "run_today_stopped", "stopped")
    crossvit.fit(crossvit.load_recipe("stopped", out="stopped"), resume=True)
    several = str(FIXTURES / "run_today_multi_label")
    today = str(FIXTURES / "run_today")
    found = {
        "gone on with": left_behind("stopped"),
        "evaluated": evaluated(today, "digits", precision="fp32"),
        "evaluated, several labels": evaluated(several, "several.csv", precision="fp32"),
        "predicted": predicted(today),
        "predicted, several labels": predicted(several),
    }
    for name in ("evaluated", "evaluated, several labels"):
        del found[name]["run"]  # a path of this machine
    return found


TWICE: dict[str, Any] = {"fusion_depth": 2}
CASES: dict[str, Case] = {
    "run-fp32": run_case(),
    "run-bf16": run_case(precision="bf16"),
    "run-fp16": run_case(precision="fp16", batch_size=4, overfit_one_batch=True),
    "run-checkpointing": run_case(gradient_checkpointing=True),
    "run-ema": run_case(ema=0.9),
    "run-drop-path": run_case(drop_path=0.3),
    "run-accumulate": run_case(accumulate=3),
    "run-mixing": run_case(mixup=0.8, cutmix=1.0, mixing_chance=0.8),
    "run-augmentation": run_case(
        min_crop=0.5,
        flip=0.5,
        randaugment="rand-m9-mstd0.5-inc1",
        erasing=0.5,
        repeats=2,
    ),
    "run-sgd": run_case(
        optimiser="sgd",
        lr=0.02,
        branch_lr=[0.5, 2.0],
        fusion_lr=3.0,
        clip=0.0,
        warmup="2 steps",
        decay_like_authors=True,
    ),
    "run-grey-balanced": run_case(channels=1, channels_last=True, sampling="balanced"),
    "run-patience": run_case(patience="1 epochs", epochs=4, lr=0.02),
    "run-several-labels": run_case(data="several.csv", class_weights="balanced"),
    "run-taught": taught,
    "run-begun-from-another": begun_from_another,
    "run-resumed": resumed,
    "model-linear": model_case(),
    "model-many-tokens": model_case(size=240, dims=(32, 32), batch=18, stages=1),
    "model-halving": model_case(tokeniser="halving", patches=(4, 8), init="xavier"),
    "model-dagger": model_case(tokeniser="dagger"),
    "model-t2t": model_case(tokeniser="t2t"),
    "model-no-fusion": model_case(fusion="none"),
    "model-all-attention": model_case(fusion="all-attention", **TWICE),
    "model-class-token": model_case(fusion="class-token"),
    "model-pairwise": model_case(fusion="pairwise"),
    "model-twice": model_case(**TWICE),
    "model-as-released": model_case(as_released=True, **TWICE),
    "model-materialised": model_case(keys_values="materialised", **TWICE),
    "model-no-class-token": model_case(class_token=False),
    "model-no-class-token-all-attention": model_case(class_token=False, fusion="all-attention"),
    "model-bare-projections": model_case(projection_norm=False, projection_gelu=False),
    "model-identity": model_case(dims=(32, 32), projection_identity=True),
    "model-apart": model_case(fusion="pairwise", projection_shared=False),
    "model-any-size": model_case(dynamic_size=True, other_size=(48, 84)),
    "model-oblong": model_case(size=(48, 84), in_channels=1),
    "model-checkpointing": model_case(checkpointing=True),
    "model-drops": model_case(drop=0.1, attention_drop=0.1, drop_path=0.3),
    "model-drops-checkpointing": model_case(checkpointing=True, drop=0.1, drop_path=0.3),
    "model-one-branch": model_case(patches=(12,), dims=(64,), fusion="none"),
    "model-three-branches": model_case(patches=(6, 12, 16), dims=(16, 32, 64)),
    "model-odd-widths": model_case(dims=(20, 36)),
    "use-digits": on_digits,
    "use-of-before": of_before,
}


# ---- this machine, its file and the processes


def machine_key() -> str:
    """Returns what bits depend on, as the name of a file: torch and the processor."""
    capabilities = torch.cpu.get_capabilities()
    parts = [
        f"torch-{torch.__version__.partition('+')[0]}",
        torch.backends.cpu.get_cpu_capability(),
    ]
    parts += [name for name in CAPABILITIES if capabilities.get(name)]
    parts.append(processor())
    return re.sub(r"[^a-z0-9._-]+", "-", "_".join(parts).lower())


def processor() -> str:
    """Returns the processor's name, family and model number where Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = re.sub(r"\(\w+\)|CPU|Processor|@.*", " ", found.get("model name", platform.machine()))
    return " ".join([*name.split(), found.get("cpu family", ""), found.get("model", "")]).strip()


def has_kernels() -> bool:
    """Whether our kernels compute here, as a run's own record says."""
    crossvit.fit(recipe("probe", epochs=1, batch_size=36))
    return bool(json.loads(Path("probe", "run.json").read_text())["kernels"])


def compute_here(mode: str, names: Iterable[str], out: Path) -> None:
    """Computes cases in this process, in the current folder, and writes what they give to `out`.

    Where there are no kernels, nothing is computed for "kernels".
    """
    torch.set_num_threads(THREADS)
    write_images()
    found = {}
    for name in names if mode == "no kernels" or has_kernels() else ():
        started = time.perf_counter()
        found[name] = CASES[name]()
        print(f"{name}, {mode}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        for folder in Path().iterdir():
            if folder.is_dir() and folder.name != "images":
                shutil.rmtree(folder)
    out.write_text(json.dumps(found), encoding="utf-8")


def compute(mode: str, names: list[str]) -> dict[str, Any]:
    """Returns what each case gives in a process of `mode`; empty where there are no kernels."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        out = Path(folder, "found.json")
        work = Path(folder, "work")
        work.mkdir()
        environment = {"GOMP_SPINCOUNT": "10000"} | os.environ | MODES[mode]
        command = [sys.executable, str(Path(__file__).resolve()), "--child", mode, str(out)]
        for name in names:
            command += ["--case", name]
        subprocess.run(command, check=True, cwd=work, env=environment)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def versions() -> dict[str, str]:
    """Returns the versions of what the bits come from."""
    own = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **own}


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Returns a line for each leaf of nested dicts and lists that is not the same in both."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = ({str(i): own for i, own in enumerate(one)} for one in (before, now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{place}: {shown(before)} -> {shown(now)}"]
    lines = []
    for key in [*before, *(key for key in now if key not in before)]:
        where = f"{place} / {key}" if place else key
        if key not in now:
            lines.append(f"{where}: gone (was {shown(before[key])})")
        elif key not in before:
            lines.append(f"{where}: new ({shown(now[key])})")
        else:
            lines += differences(before[key], now[key], where)
    return lines


def shown(value: Any) -> str:
    """Returns `value` on one line that is not too long."""
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def laid_out(value: Any, indent: int = 0) -> str:
    """Returns `value` as JSON, with what fits into WIDTH columns on one line."""
    line = json.dumps(value)
    if not (value and isinstance(value, dict | list)) or indent + len(line) <= WIDTH:
        return line
    if isinstance(value, dict):
        inner = [f"{json.dumps(key)}: {laid_out(own, indent + 1)}" for key, own in value.items()]
        first, last = "{", "}"
    else:
        inner = [laid_out(own, indent + 1) for own in value]
        first, last = "[", "]"
    lines = ",\n".join(" " * (indent + 1) + own for own in inner)
    return f"{first}\n{lines}\n{' ' * indent}{last}"


def compare(path: Path, names: list[str]) -> list[str]:
    """Returns what differs from the file at `path`, in a line each."""
    known = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for mode, before in known["results"].items():
        now = compute(mode, names)
        if mode == "kernels" and not now:
            lines.append("kernels: the file has them, and here there are none")
            continue
        lines += differences({key: before[key] for key in names if key in before}, now, mode)
    if lines:
        other = differences(known["versions"], versions())
        lines += [f"(another version may be why) {line}" for line in other]
    return lines


def write(path: Path, names: list[str]) -> None:
    """Writes what the cases give into the file at `path`; its other cases stay."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"results": {}}
    results = known["results"]
    for mode in MODES:
        if now := compute(mode, names):
            merged = results.get(mode, {}) | now
            results[mode] = {name: merged[name] for name in CASES if name in merged}
    record = {
        "processor": processor(),
        "threads": THREADS,
        "kernels": "kernels" in results,
        "versions": versions(),
        "results": results,
    }
    path.write_text(laid_out(record) + "\n", encoding="utf-8")


def main() -> int:
    """Does what the command line asks for and returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="make the file instead of comparing")
    parser.add_argument("--case", action="append", metavar="NAME", help="a case, or 'run-*'")
    parser.add_argument("--file", type=Path, help="in place of this machine's own file")
    parser.add_argument("--child", nargs=2, metavar=("MODE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    patterns = given.case or ["*"]
    names = [name for name in CASES if any(fnmatch.fnmatch(name, one) for one in patterns)]
    if not names:
        parser.error(f"no case is called {' or '.join(patterns)}: there are {', '.join(CASES)}")
    if given.child:
        compute_here(given.child[0], names, Path(given.child[1]))
        return 0
    path = given.file or Path(__file__).with_name(f"{machine_key()}.json")
    if given.write:
        write(path, names)
        return 0
    if not path.is_file():
        print(f"no golden bits for this processor and torch ({path.name}): make them with --write")
        return NO_FILE
    lines = compare(path, names)
    print("\n".join([*lines, f"{len(lines)} differences"]) if lines else "every bit is the same")
    print(f"{len(names)} cases with {Path(crossvit.__file__).parent}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
