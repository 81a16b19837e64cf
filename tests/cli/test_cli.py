"""The command: what scripts rely on. One line for an error, its exit status, JSON alone on stdout, and a fast `--help`."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import crossvit
from crossvit.results import TrainingResult

Command = Callable[..., tuple[int, str, str]]

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "matplotlib",
    "PIL",
    "numpy",
    "sklearn",
    "fastapi",
    "starlette",
    "jinja2",
)
ROOT = Path(__file__).parents[2]


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted(name.split('.')[0] for name in sys.modules), file=sys.__stderr__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import crossvit; dir(crossvit); crossvit.__version__",
        "from crossvit.cli import run; run(['--help'])",
        "from crossvit.cli import run; run(['train', '--help'])",
        "from crossvit.cli import run; run(['models', '--json'])",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_after(code) & set(HEAVY) == set()


def test_every_public_name_is_there_and_comes_twice() -> None:
    assert crossvit.__all__ == sorted(crossvit.__all__)
    for name in crossvit.__all__:
        assert getattr(crossvit, name) is getattr(crossvit, name)
        assert name in dir(crossvit)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        crossvit.nothing  # noqa: B018


def test_a_function_and_a_module_never_share_a_name() -> None:
    for name in crossvit.__all__:
        if name != "__version__":
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(f"crossvit.{name}")
    assert callable(crossvit.evaluate)


def test_version_and_help(command: Command) -> None:
    assert command("--version") == (0, f"crossvit {crossvit.__version__}\n", "")
    status, out, _ = command("--help")
    assert status == 0
    assert all(verb in out for verb in ("train", "evaluate", "predict", "models"))
    assert command()[1] == out
    status, out, _ = command("train", "--help")
    for option in (
        "model",
        "weights",
        "epochs",
        "batch-size",
        "lr",
        "image-size",
        "seed",
        "precision",
        "device",
        "workers",
        "resume",
    ):
        assert f"--{option}" in out


def test_models_lists_every_preset(command: Command) -> None:
    status, out, err = command("models")
    assert (status, err) == (0, "")
    assert all(name in out for name in crossvit.list_models())
    assert re.search(r"crossvit_9_dagger_240 +240x240 +8\.78 M +1\.979 G +77\.1 %", out)
    listed = json.loads(command("models", "--json")[1])["models"]
    assert [row["name"] for row in listed] == crossvit.list_models()


def test_train_evaluate_predict_and_their_json(
    command: Command, scans: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, out, err = command(
        "train",
        scans,
        "--out",
        run,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--json",
    )
    assert status == 0, err
    trained = json.loads(out)
    assert trained["run"] == str(run)
    assert "3 classes, 60 images" in err
    assert (run / "report.html").stat().st_size > 10_000

    status, out, err = command("evaluate", run, scans, "--json")
    evaluated = json.loads(out)
    assert (status, err) == (0, "")
    assert list(evaluated)[:4] == ["top1", "n", "run", "data"]
    assert evaluated["top1"] == trained["top1"]
    assert [branch["name"] for branch in evaluated["branches"]] == ["S", "L"]
    assert "top-1" in command("evaluate", run, scans)[1]

    status, out, _ = command("predict", run, scans / "0", "--top-k", 2, "--json")
    predicted = json.loads(out)
    assert (status, predicted["n"], predicted["failed"]) == (0, 20, 0)
    assert len(predicted["predictions"][0]["top"]) == 2
    assert len(command("predict", run, scans / "0" / "*.png")[1].splitlines()) == 20


def test_predict_says_which_image_failed_and_goes_on(
    command: Command, tiny_run: TrainingResult, own_scans: Path
) -> None:
    (own_scans / "0" / "0000-bad.png").write_text("hello")
    status, out, _ = command("predict", tiny_run.run, own_scans / "0")
    assert status == 1
    assert "0000-bad.png  error: not an image in a format read here" in out
    assert len(out.splitlines()) == 9


BAD_CALLS = {
    "no such folder": (
        ["train", "nowhere", "--out", "OUT"],
        2,
        "no folder nowhere: give a folder of class folders",
    ),
    "unknown model": (
        ["train", "digits", "--out", "OUT", "--model", "crossvit_pica_32"],
        2,
        "did you mean crossvit_pico_32",
    ),
    "negative epochs": (
        ["train", "digits", "--out", "OUT", "--epochs", "-3"],
        2,
        "epochs = -3: should be a whole number",
    ),
    "epochs not a number": (["train", "digits", "--out", "OUT", "--epochs", "many"], 2, "many"),
    "no --out": (["train", "digits"], 2, "out"),
    "unknown option": (["train", "digits", "--out", "OUT", "--epoch", "3"], 2, "--epoch"),
    "unknown verb": (["tarin", "digits"], 2, "tarin"),
    "unknown recipe": (
        ["train", "digits", "--out", "OUT", "--recipe", "smal"],
        2,
        "did you mean small",
    ),
    "image smaller than a patch": (
        ["train", "digits", "--out", "OUT", "--image-size", "4"],
        2,
        "shorter than the 8-pixel patch",
    ),
    "device not here": (
        ["train", "digits", "--out", "OUT", "--device", "tpu"],
        2,
        "device = 'tpu': should be one of",
    ),
    "weights not here": (
        ["train", "digits", "--out", "OUT", "--weights", "gone.pth"],
        2,
        "no weights at gone.pth",
    ),
    "run not here": (["evaluate", "gone", "digits"], 2, "no weights at gone: give a run folder"),
    "no image": (["predict", "RUN"], 2, "no image given"),
    "image not here": (["predict", "RUN", "gone.jpg"], 2, "no image at gone.jpg"),
    "top-k of zero": (
        ["predict", "RUN", "SCANS", "--top-k", "0"],
        2,
        "top_k = 0: should be 1 or more",
    ),
    "batch of nothing": (
        ["evaluate", "RUN", "SCANS", "--batch-size", "0"],
        2,
        "batch_size = 0: should be 1 or more",
    ),
    "seed too large": (
        ["train", "digits", "--out", "OUT", "--seed", "5000000000"],
        2,
        "seed = 5000000000: should be",
    ),
    "resume and overwrite": (
        ["train", "SCANS", "--out", "RUN", "--resume", "--overwrite"],
        2,
        "give one of them",
    ),
    "run exists": (["train", "digits", "--out", "RUN"], 2, "exists: add --resume"),
    "resume with a change": (
        ["train", "SCANS", "--out", "RUN", "--resume", "--epochs", "7"],
        2,
        "--resume cannot change --epochs 7",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_wrong_call_is_one_line_with_the_fix(
    case: str, command: Command, tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    words, expected, says = BAD_CALLS[case]
    places = {"OUT": str(tmp_path / "out"), "RUN": tiny_run.run, "SCANS": str(scans)}
    status, out, err = command(*(places.get(word, word) for word in words))
    assert status == expected
    assert out == ""
    assert err.startswith("crossvit: ")
    assert len(err.splitlines()) == 1
    assert says in err
    assert not (tmp_path / "out").exists()


def test_training_refuses_what_it_can_before_torch_is_loaded(
    tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    code = (
        "import json, sys\n"
        "from crossvit.cli import run\n"
        "print([run(call) for call in json.loads(sys.argv[1])], 'torch' in sys.modules)"
    )
    new = ["train", str(scans), "--out", str(tmp_path / "out")]
    calls = [
        [*new, "--lr", "-1"],
        [*new, "--model", "crossvit_9_420"],
        [*new, "--resume", "--overwrite"],
        [*new, "--weights", str(tmp_path / "gone.pth")],
        ["train", str(tmp_path / "gone"), "--out", str(tmp_path / "out")],
        ["train", str(scans), "--out", str(scans / "out")],
        ["train", str(scans), "--out", tiny_run.run],
        ["train", str(scans), "--out", tiny_run.run, "--resume", "--epochs", "7"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{[2] * len(calls)} False\n"
    says = [
        "lr = -1.0", "crossvit_9_240", "one of them", "no weights at", "no folder", "inside the images", "exists",
        "cannot change --epochs 7",
    ]  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == len(calls)
    assert all(said in line for said, line in zip(says, lines, strict=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lerning-rate", "--lr"),
        ("--ema-decay=0.9", "--ema"),
        ("--batch", "--batch-size or --overfit-one-batch"),
        ("--rsume", "--resume"),
        ("--epoch", "--epochs"),
    ],
)
def test_an_unknown_option_of_train_is_told_the_one_meant(
    given: str, meant: str, command: Command
) -> None:
    status, out, err = command("train", "photos", "--out", "run", given, "1")
    name = given.partition("=")[0]
    assert (status, out) == (2, "")
    assert (
        err
        == f"crossvit: Unknown option: {name}. Did you mean {meant}? (see `crossvit train --help`)\n"
    )


def test_broken_images_are_failed_work(command: Command, own_scans: Path, tmp_path: Path) -> None:
    (own_scans / "0" / "zero.png").write_bytes(b"")
    status, _, err = command("train", own_scans, "--out", tmp_path / "out")
    assert status == 1
    assert "1 of" in err
    assert "zero.png: the file is empty (0 bytes)" in err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_cut_in_half_is_one_line(
    command: Command, tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    import shutil

    run = shutil.copytree(tiny_run.run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "result": None}))
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    status, _, err = command("train", scans, "--out", run, "--resume")
    assert status == 1
    assert err.splitlines()[-1].startswith("crossvit: no whole checkpoint in")
    assert "start again with --overwrite" in err


def test_debug_shows_the_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crossvit", "predict", "gone", "x", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("crossvit: ")


@pytest.mark.parametrize("words", ["predict 'RUN' 'SCANS'", "--help", "train --help", "models"])
def test_standard_output_closed_early_is_no_error(
    words: str, tiny_run: TrainingResult, scans: Path
) -> None:
    words = words.replace("RUN", tiny_run.run).replace("SCANS", str(scans))
    shell = f"'{sys.executable}' -m crossvit {words} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_what_nobody_foresaw_is_one_line_too(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no\nsuch\nthing")

    monkeypatch.setattr("crossvit.cli.terminal.print_models", fail)
    assert command("models") == (
        1,
        "",
        "crossvit: RuntimeError: no such thing (--debug shows where)\n",
    )


def test_ctrl_c_anywhere_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crossvit.cli.terminal.print_models", interrupt)
    assert command("models") == (130, "", "crossvit: stopped\n")


def test_tables_are_not_cut_in_a_narrow_terminal(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for words in (["models"], ["models", "--paper"]):
        out = command(*words)[1]
        assert "crossvit_15_dagger_408" in out
        assert "…" not in out


def test_the_papers_tables_mark_every_difference_with_its_reason(command: Command) -> None:
    out = command("models", "--paper")[1]
    assert re.search(r"D: L = 2 +crossvit_small_240_d +81\.0 +5\.6 +5\.9\* ", out)
    assert "* D: L = 2, GMACs: printed for the released code" in out
    tables = json.loads(command("models", "--paper", "--json")[1])["tables"]
    assert {row["table"] for row in tables} >= {"Table 1", "Table 6", "Table 7", "Table 8"}


def test_every_command_in_the_readme_is_real(command: Command) -> None:
    """Each `crossvit VERB --option` and `make TARGET` in README.md exists."""
    readme = (ROOT / "README.md").read_text()
    calls = re.findall(
        r"^(?:\$ )?(?:\.venv/bin/)?crossvit ((?:weights|data) [a-z-]+|[a-z]+)(.*)$",
        readme,
        flags=re.MULTILINE,
    )
    assert {verb for verb, _ in calls} >= {
        "train",
        "evaluate",
        "predict",
        "models",
        "weights convert",
        "weights save-timm",
    }
    for verb, rest in calls:
        status, help_text, _ = command(*verb.split(), "--help")
        assert status == 0, verb
        for option in re.findall(r"--[a-z-]+", rest.split("#")[0]):
            assert option in help_text, (verb, option)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", readme, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
