"""The pages: what they show, that they stand alone, and runs compared on the same images."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crossvit.errors import UsageError
from crossvit.evaluation.bootstrap import compare
from crossvit.evaluation.comparison import common_data, compare_runs, differing, short_names
from crossvit.report.comparison import Axis, comparison_page
from crossvit.report.matrix import ALL_SHOWN, MOST_CONFUSED, matrix_of
from crossvit.report.page import PICTURE_BYTES, evaluation_page, run_page
from crossvit.results import ClassScore, Evaluation, Interval, RunRecord, TrainingResult
from crossvit.run import Run
from support.evaluations import (
    class_names,
    made_comparison,
    made_epochs,
    made_evaluation,
    made_multi_label,
    made_record,
)

LIMIT = 5_000_000  # bytes of a page


class Page(HTMLParser):
    """Collects what a page asks for and shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]
        self.anchors += [
            value[1:] for name, value in attrs if tag == "a" and value and name == "href"
        ]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def words(text: str) -> str:
    """What a page says, without its tags."""
    return re.sub(
        r"[ \n]+",
        " ",
        unescape(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)),
    )


def small(confusion: list[list[int]]) -> Evaluation:
    """An evaluation of a literal confusion matrix."""
    counts = np.array(confusion)
    names = [chr(ord("a") + index) for index in range(len(counts))]
    made = made_evaluation(names, each=4)
    classes = tuple(
        ClassScore(name, int(row.sum()), 0.5, 0.5, 0.5)
        for name, row in zip(names, counts, strict=True)
    )
    return dataclasses.replace(made, confusion=counts, classes=classes)


# ---------------------------------------------------------------- the matrix


def test_a_literal_matrix() -> None:
    matrix = matrix_of(small([[8, 2, 0], [0, 4, 0], [3, 1, 0]]))
    assert matrix is not None
    assert [(row.name, row.n, row.wrong, row.others) for row in matrix.rows] == [
        ("a", 10, 2, 0),
        ("b", 4, 0, 0),
        ("c", 4, 4, 0),
    ]
    assert [cell.count for cell in matrix.rows[0].cells] == [8, 2, 0]
    assert matrix.rows[0].cells[1].description == "a predicted as b, 2 of 10 (20.0\u202f%)"
    assert matrix.rows[0].cells[0].description == "a: correct, 8 of 10 (80.0\u202f%)"
    assert matrix.rows[2].cells[0].shade == pytest.approx(0.75**0.5)
    assert [(pair.label, pair.predicted, pair.count, pair.n) for pair in matrix.pairs] == [
        ("c", "a", 3, 4),
        ("a", "b", 2, 10),
        ("c", "b", 1, 4),
    ]
    assert matrix.confused_with["c"] == matrix.pairs[0]
    assert matrix.confused_with["b"] is None
    assert not matrix.cut


def test_a_matrix_of_too_many_classes_shows_the_most_confused_and_loses_no_image() -> None:
    evaluation = made_evaluation(class_names(ALL_SHOWN + 1), each=8)
    matrix = matrix_of(evaluation)
    assert matrix is not None
    assert matrix.cut
    assert (len(matrix.names), matrix.classes) == (MOST_CONFUSED, ALL_SHOWN + 1)
    wrong = evaluation.confusion - np.diag(evaluation.confusion.diagonal())
    involved = dict(
        zip(
            class_names(ALL_SHOWN + 1),
            (wrong.sum(axis=0) + wrong.sum(axis=1)).tolist(),
            strict=True,
        )
    )
    left_out = set(involved) - set(matrix.names)
    assert min(involved[name] for name in matrix.names) >= max(involved[name] for name in left_out)
    for row in matrix.rows:
        assert sum(cell.count for cell in row.cells) + row.others == row.n
    assert sum(row.others for row in matrix.rows) > 0


# ---------------------------------------------------------------- pages


def run_of(evaluation: Evaluation, names: list[str]) -> TrainingResult:
    return TrainingResult(
        "runs/hand made",
        evaluation.top1,
        evaluation.n,
        131.0,
        made_record(names),
        made_epochs(12),
        evaluation,
    )


@pytest.mark.parametrize("count", [3, 10, 100, 1000])
def test_a_page_stands_alone_in_little_room(count: int) -> None:
    names = class_names(count)
    evaluation = made_evaluation(names, each=8)
    text = run_page(run_of(evaluation, names), evaluation)
    page = Page(text)
    assert [link for link in page.asked if not link.startswith(("data:", "#"))] == []
    assert set(page.anchors) <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert "url(http" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert len(text.encode()) < LIMIT / 3
    assert page.tags.count("img") == 2 * len(evaluation.mistakes) > 0  # each with its map


def test_a_run_page_says_everything_of_the_run() -> None:
    names = class_names(10)
    evaluation = made_evaluation(names)
    assert evaluation.calibration is not None
    says = words(run_page(run_of(evaluation, names), evaluation))
    correct = round(evaluation.top1 * evaluation.n)
    for expected in (
        f"{100 * evaluation.top1:.1f}\u202f%",
        f"{100 * evaluation.top1 - 2:.1f} – {100 * evaluation.top1 + 1.9:.1f}\u202f%",
        f"on {evaluation.n} val images, {evaluation.n - correct} wrong",
        "2 images are on both sides of the split",
        "3 files of kinds that are not read",
        f"differ by {100 * evaluation.calibration.ece:.1f}\u202f% on average",
        "Dividing the logits by 1.31 would bring that to",
        "branch S 12-pixel patches",
        "−6.0\u202fpoints",
        "jpeg compression",
        "131 s on cpu, bf16, 2 threads",
        "12 s (",
        "torch 2.14.1",
        "crossvit train '/data/ocean creatures' --recipe 'runs/hand made' --out 'runs/hand made-again'",
        "optimiser.lr\xa0 0.001",
    ):
        assert expected in says
    counts = re.findall(
        r'<td class="[hm]" style="--s:[\d.]+" title="[^"]*">(\d+)</td>',
        run_page(run_of(evaluation, names), evaluation),
    )
    assert sum(map(int, counts)) == evaluation.n


def test_a_page_escapes_names() -> None:
    names = ["<script>alert(1)</script>", "quote \" and ' and &", "</style>"]
    evaluation = made_evaluation(names)
    text = evaluation_page(evaluation, command="crossvit evaluate '<i>' data")
    assert text.count("<script>") == 1  # our own
    assert text.count("</style>") == text.count("<style")
    assert "<i>" not in text.replace('<i style="', "")
    for name in names:
        assert name in unescape(text)


def test_the_policy_lets_our_script_run_and_no_other() -> None:
    import base64
    import hashlib

    text = evaluation_page(made_evaluation(class_names(3)), command="crossvit evaluate run data")
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert f"script-src 'sha256-{digest}'" in unescape(policy)


def test_an_evaluation_without_a_run_or_anything_beyond_scores_has_a_page() -> None:
    evaluation = dataclasses.replace(
        made_evaluation(class_names(3)),
        intervals={},
        calibration=None,
        selective=None,
        robustness=None,
        mistakes=(),
        branches=(),
    )
    text = evaluation_page(
        evaluation, command="crossvit evaluate timm/crossvit_15_dagger_240.in1k photos"
    )
    page, says = Page(text), words(text)
    assert "crossvit evaluate timm/crossvit_15_dagger_240.in1k photos" in says
    assert "svg" not in page.tags
    assert "trust" not in page.ids
    assert set(page.anchors) <= set(page.ids)


def test_nothing_wrong_is_said_in_words() -> None:
    evaluation = dataclasses.replace(
        small([[5, 0], [0, 5]]), top1=1.0, n=10, correct=(), mistakes=()
    )
    says = words(evaluation_page(evaluation, command="crossvit evaluate run data"))
    assert "on 10 val images, 0 wrong" in says
    assert "every prediction is correct" in says
    assert "most often" not in says.replace("most often confused with", "")


def test_a_multi_label_page_has_its_own_table() -> None:
    evaluation = made_multi_label(class_names(5))
    text = evaluation_page(
        evaluation, command="crossvit evaluate run photos.csv", record=made_record(class_names(5))
    )
    says = words(text)
    assert "mean average precision" in says
    assert "66.0 – 74.0\u202f%" in says
    assert 'class="confusion' not in text
    order = [
        says.index(f"{name} {n}")
        for name, n in (("fig 10", 44), ("écrevisse à pattes rouges", 43), ("crab", 40))
    ]
    assert order == sorted(order)  # the lowest average precision first


def test_pictures_that_take_too_much_room_are_left_out() -> None:
    evaluation = made_evaluation(class_names(3), each=40, accuracy=0.6)
    large = tuple(
        dataclasses.replace(
            mistake, picture=mistake.picture.ljust(PICTURE_BYTES // 6, b"\0"), map=b""
        )
        for mistake in evaluation.mistakes
    )
    text = evaluation_page(
        dataclasses.replace(evaluation, mistakes=large), command="crossvit evaluate run data"
    )
    assert Page(text).tags.count("img") == 6 < len(large)
    assert len(text) < LIMIT


def test_a_run_page_says_when_the_best_epoch_was_chosen_on_these_images() -> None:
    names = class_names(3)
    evaluation = made_evaluation(names)
    result = run_of(evaluation, names)
    record = result.record
    best = dataclasses.replace(record.result, selected_epoch=7)
    chosen = dataclasses.replace(result, record=dataclasses.replace(record, result=best))
    assert "the last epoch's" in words(run_page(result, evaluation))
    assert "those of epoch 7, the best on these very images: expect a little less" in words(
        run_page(chosen, evaluation)
    )


# ---------------------------------------------------------------- what a page needs

DRAWN_ALONE = """
import sys
from crossvit.report.comparison import comparison_page
from crossvit.report.page import run_page
from crossvit.results import TrainingResult
from crossvit.results.run_record import RunRecord
from support.evaluations import made_comparison, made_epochs, made_evaluation, made_record
evaluation = made_evaluation(["crab", "lobster"])
record = RunRecord.from_dict(made_record(["crab", "lobster"]).to_dict())
log = [vars(epoch) for epoch in made_epochs(3)]
assert "Learning curves" in run_page(TrainingResult.of_finished("run", record, log), evaluation)
assert "McNemar" in comparison_page(made_comparison(accuracies=(0.8, 0.9)), command="crossvit")
print(*sys.modules)
"""


def modules_of(script: str, *words: object) -> set[str]:
    """Returns the modules that a process has imported when `script` is done."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    return set(done.stdout.splitlines()[-1].split())


def test_pages_are_drawn_without_torch_or_the_training_room() -> None:
    modules = modules_of(DRAWN_ALONE)
    rooms = {name.split(".")[1] for name in modules if name.startswith("crossvit.")}
    assert "torch" not in modules
    assert rooms <= {
        "report",
        "results",
        "errors",
        "text",
        "evaluation",
    }  # bootstrap, for what is drawn


def test_the_verb_report_does_without_the_training_room(
    tiny_run: TrainingResult, tmp_path: Path
) -> None:
    script = "import sys; from crossvit.cli import run; assert run(sys.argv[1:]) == 0; print(*sys.modules)"
    modules = modules_of(script, "report", tiny_run.run, "--out", tmp_path / "page.html")
    assert [name for name in modules if name.startswith("crossvit.train.")] == []
    assert "crossvit.report.page" in modules


# ---------------------------------------------------------------- runs side by side


@pytest.fixture(scope="module")
def two_runs(
    tiny_run: TrainingResult, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run, and a copy whose classifiers name the next class: on the same held-out images."""
    folder = tmp_path_factory.mktemp("compared")
    first, second = (
        Path(shutil.copytree(tiny_run.run, folder / "first")),
        Path(shutil.copytree(tiny_run.run, folder / "second")),
    )
    weights = load_file(second / "model.safetensors")
    rolled = {
        name: np.roll(own, 1, axis=0) if name.startswith("heads.") and len(own) == 3 else own
        for name, own in weights.items()
    }
    assert any(not np.array_equal(rolled[name], weights[name]) for name in weights)
    save_file(rolled, second / "model.safetensors")
    record = Run(second).record().to_dict()
    record["recipe"]["optimiser"]["lr"] = 0.125
    record["recipe"]["epochs"] = 2
    (second / "run.json").write_text(json.dumps(record))
    return first, second


def test_runs_are_compared_on_what_both_held_out(two_runs: tuple[Path, Path]) -> None:
    calls: list[tuple[int, int]] = []
    found = compare_runs(two_runs, progress=lambda done, total: calls.append((done, total)))
    first, second = (run.evaluation for run in found.runs)
    assert [run.name for run in found.runs] == ["first", "second"]
    assert (found.split, found.n) == ("held-out", 12)
    assert first.images == second.images
    assert first.correct != second.correct
    assert found.tests == (compare(first, second),)
    assert found.differing == {"epochs": (1, 2), "optimiser.lr": (0.001, 0.125)}
    assert found.runs[0].parameters == sum(
        own.size for own in load_file(two_runs[0] / "model.safetensors").values()
    )
    assert calls[-1] == (24, 24)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_report_compares_runs(
    two_runs: tuple[Path, Path], command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    page = tmp_path / "both runs.html"
    status, out, _ = command("report", *two_runs, "--out", page)
    assert status == 0
    assert "second  against first: " in out
    assert out.endswith(f"report {page} (open it in a browser)\n")
    text = page.read_text()
    assert [link for link in Page(text).asked if not link.startswith(("data:", "#"))] == []
    says = words(text)
    assert "comparison of 2 runs" in says
    assert "optimiser.lr" in says
    assert "McNemar's exact test" in says
    status, out, _ = command("report", *two_runs, "--out", page, "--json")
    found = json.loads(out)
    assert [run["name"] for run in found["runs"]] == ["first", "second"]
    assert found["tests"][0]["n"] == found["n"] == 12
    assert "record" not in found["runs"][0]


def test_report_writes_a_runs_page_anew(
    two_runs: tuple[Path, Path], command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run, _ = two_runs
    (run / "report.html").unlink(missing_ok=True)
    status, out, _ = command("report", run)
    assert status == 0
    assert "Learning curves" in (run / "report.html").read_text()
    status, out, _ = command("report", run, "--json", "--out", tmp_path / "elsewhere.html")
    assert json.loads(out)["n"] == 12
    assert "calibration error" in (tmp_path / "elsewhere.html").read_text()


def test_runs_that_held_out_different_images_are_refused_with_the_way_out(
    two_runs: tuple[Path, Path], command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    first, _ = two_runs
    other = Path(shutil.copytree(first, tmp_path / "other"))
    record = Run(other).record().to_dict()
    held_out = record["data"]["held_out"]
    kept = dict(list(held_out.items())[:-1])
    (other / "run.json").write_text(
        json.dumps({**record, "data": {**record["data"], "held_out": kept}})
    )
    status, _, err = command("report", first, other, "--out", tmp_path / "x.html")
    assert status == 2
    assert "first and other held out different images, so their scores cannot be compared" in err
    assert "--data DATA" in err
    status, _, err = command(
        "report", first, other, "--data", record["recipe"]["data"], "--out", tmp_path / "x.html"
    )
    assert status == 2
    assert "(12 and 11, 11 in common)" in err
    status, _, err = command("report", first, first)
    assert (status, "is given twice: leave one out" in err) == (2, True)
    status, _, err = command("report", first, tmp_path / "nowhere")
    assert (status, "is not a run folder" in err) == (2, True)
    assert not (tmp_path / "x.html").exists()
    for place in (tmp_path, tmp_path / "no" / "x.html"):  # said before anything is computed
        status, _, err = command("report", first, "--out", place)
        assert (status, "cannot be a file: name one in a folder that is there" in err) == (2, True)


def test_data_with_a_part_to_hold_out_is_told_apart_by_its_fingerprint() -> None:
    made = made_record(class_names(3))

    def record(part: str, fingerprint: str, location: str = "photos") -> RunRecord:
        data = dataclasses.replace(made.data, held_out_part=part, fingerprint=fingerprint)
        return dataclasses.replace(made, data=data, recipe={"data": location})

    assert (
        common_data({"a": record("val", "1"), "b": record("val", "1", "moved/photos")}) == "photos"
    )
    for other in (record("val", "2"), record("test", "1")):
        with pytest.raises(UsageError, match="a and b held out different images"):
            common_data({"a": record("val", "1"), "b": other})


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["x/run", "y/run", "z/other"]) == ["x/run", "y/run", "other"]
    assert short_names(["run", "x/run"]) == ["run", "x/run"]


def test_recipes_differ_field_by_field() -> None:
    one = {"epochs": 1, "out": "a", "optimiser": {"lr": 0.1, "clip": 1.0}}
    other = {"epochs": 1, "out": "b", "optimiser": {"lr": 0.2, "clip": 1.0}, "new": True}
    assert differing([one, other]) == {"optimiser.lr": (0.1, 0.2), "new": (None, True)}
    assert differing([one, one]) == {}


def test_names_of_runs_are_not_confused_with_formulas() -> None:
    found = made_comparison(accuracies=(0.8, 0.9))
    first = dataclasses.replace(found.runs[0], name="a$x^2$ <b>")
    page = comparison_page(
        dataclasses.replace(found, runs=(first, found.runs[1])), command="crossvit report a b"
    )
    assert page.count("a$x^2$ &lt;b&gt;") >= 3  # in tables, and in the legend


def test_an_axis_places_figures_between_its_ends() -> None:
    axis = Axis.around([Interval(0.2, 0.4), None, Interval(0.3, 0.6)])
    assert axis.low < 0.2 < 0.6 < axis.high
    assert axis.at((axis.low + axis.high) / 2) == "50.0%"
    assert axis.across(Interval(axis.low, axis.high)) == "100.0%"


def test_a_comparison_says_what_the_test_found() -> None:
    better = made_comparison(accuracies=(0.6, 0.9))
    assert "second is better than first" in words(
        comparison_page(better, command="crossvit report a b")
    )
    assert "the difference is second minus first, in points" in words(
        comparison_page(better, command="crossvit report a b")
    )
    same = made_comparison(accuracies=(0.8, 0.8), seeds=(0, 0))
    assert "second gets as many right as first" in words(
        comparison_page(same, command="crossvit report a b")
    )
