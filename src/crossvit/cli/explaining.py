"""The verb `crossvit explain`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from crossvit.cli.flag import Switch
from crossvit.text import json_line, percent

if TYPE_CHECKING:
    from crossvit.results import Explanation, Faithfulness, MapScore


def explain(
    run: str,
    /,
    *images: str,
    out: str | None = None,
    class_name: Annotated[str | None, Parameter(name="--class")] = None,
    features: Switch = False,
    check: Switch = False,
    sample: int = 200,
    steps: int = 10,
    fill: str = "blur",
    split: str | None = None,
    seed: int = 0,
    device: str = "auto",
    skip_bad: Switch = False,
    json: Switch = False,
) -> int:
    """Show which parts of a photo the answer came from: what each branch looked at and where the branches disagree.

    Writes a picture and its arrays for each image. With --check, measures on labelled images whether the maps mean anything:
    `crossvit explain RUN DATA --check`. Exits with 1 if an image could not be read; the others are explained all the same.

    Parameters
    ----------
    run
        A run folder made by `crossvit train`, a weight file, or a name on the hub.
    images
        Image files, folders (searched through) or globs. With --check, one DATA as for `evaluate`.
    out
        The folder to write to: NAME.explanation.png and NAME.explanation.npz; with --check faithfulness.png and .json.
    class_name
        Explain this class instead of the model's own answer.
    features
        Draw the feature maps after the last encoder too (the paper's Figure 5): NAME.features.png.
    check
        Take cells of each picture away in each map's order and put them back, against random maps.
    sample
        With --check: how many images, drawn by --seed.
    steps
        With --check: into how many equal steps taking away is divided.
    fill
        With --check: what stands where a cell is away, blur (the picture, blurred) or mean (its mean colour).
    split
        With --check: the part of DATA, as for `evaluate`.
    seed
        With --check: draws the images and the random maps.
    device
        auto, cpu, cuda or mps.
    skip_bad
        With --check: leave out images that cannot be decoded instead of stopping.
    json
        Print one JSON object on stdout.
    """
    from crossvit.errors import UsageError

    if check:
        if len(images) != 1:
            raise UsageError(
                f"--check takes one DATA and got {len(images)}: `crossvit explain RUN DATA --check`"
            )
        if class_name is not None or features:
            raise UsageError(
                "--check measures the model's own answers: leave out --class and --features"
            )
        return _check(
            run,
            images[0],
            out=out,
            sample=sample,
            steps=steps,
            fill=fill,
            split=split,
            seed=seed,
            device=device,
            skip_bad=skip_bad,
            json=json,
        )
    if not images:
        raise UsageError(
            "no image given: `crossvit explain RUN photo.jpg --out DIR`, a folder, or a glob"
        )
    if out is None:
        raise UsageError(
            "no --out given: name the folder that the pictures and arrays are written to"
        )
    return _explain(
        run, images, Path(out), class_name=class_name, features=features, device=device, json=json
    )


def _explain(
    run: str, images: tuple[str, ...], out: Path, *, class_name: str | None, features: bool, device: str, json: bool
) -> int:  # fmt: skip
    from crossvit.cli.progress import counting
    from crossvit.explanation.explainer import Explainer
    from crossvit.prediction.image_paths import find_images
    from crossvit.results import to_json

    paths = find_images(images)
    explainer = Explainer(run, class_name=class_name, device=device)
    _make(out)
    taken: Counter[str] = Counter()
    failed = 0
    found = []
    with counting("explaining") as progress:
        for done, path in enumerate(paths):
            explanation = explainer(path)
            failed += explanation.error is not None
            if explanation.error is None:
                explanation = _write(explanation, out, _name(path, taken), features=features)
            if json:
                found.append(to_json(explanation))
            else:
                _print_explanation(explanation)
            progress(done + 1, len(paths))
    if json:
        print(json_line({"run": run, "n": len(paths), "failed": failed, "explanations": found}))
    return 1 if failed else 0


def _check(
    run: str,
    data: str,
    *,
    out: str | None,
    sample: int,
    steps: int,
    fill: str,
    split: str | None,
    seed: int,
    device: str,
    skip_bad: bool,
    json: bool,
) -> int:
    from crossvit.cli.progress import counting
    from crossvit.explanation.faithfulness import check_maps
    from crossvit.files import write_atomically
    from crossvit.report.deletion import faithfulness_png
    from crossvit.results import to_json

    if out is not None:
        _make(Path(out))
    with counting("checking maps") as progress:
        result = check_maps(
            run,
            data,
            images=sample,
            steps=steps,
            fill=fill,
            split=split,
            seed=seed,
            device=device,
            skip_bad=skip_bad,
            progress=progress,
        )
    record = json_line(to_json(result))
    if out is not None:
        write_atomically(Path(out) / "faithfulness.png", faithfulness_png(result))
        write_atomically(Path(out) / "faithfulness.json", record.encode())
    if json:
        print(record)
    else:
        _print_faithfulness(result, out)
    return 0


def _make(folder: Path) -> None:
    from crossvit.errors import WorkError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --out"
        ) from error


def _name(path: str, taken: Counter[str]) -> str:
    """The image's own name without its ending; the second of that name has -2 behind it."""
    stem = Path(path).stem
    taken[stem] += 1
    return stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"


def _write(explanation: Explanation, out: Path, name: str, *, features: bool) -> Explanation:
    """The same explanation, with the files that were written. Their endings keep them from replacing the photos."""
    import dataclasses

    from crossvit.explanation.explainer import npz_bytes
    from crossvit.files import write_atomically
    from crossvit.report.maps import explanation_png, features_png

    picture, arrays = out / f"{name}.explanation.png", out / f"{name}.explanation.npz"
    write_atomically(picture, explanation_png(explanation))
    write_atomically(arrays, npz_bytes(explanation))
    written = dataclasses.replace(explanation, picture=str(picture), arrays=str(arrays))
    if features:
        sheet = out / f"{name}.features.png"
        write_atomically(sheet, features_png(explanation))
        written = dataclasses.replace(written, features_picture=str(sheet))
    return written


def _print_explanation(explanation: Explanation) -> None:
    if explanation.error is not None:
        print(
            f"{explanation.image}  error: {explanation.error.removeprefix(explanation.image + ': ')}"
        )
        return
    assert explanation.top is not None
    assert explanation.explained is not None
    parts = [
        f"branch {branch.name} {branch.top.label} {percent(branch.top.probability)}"
        for branch in explanation.branches
    ]
    if explanation.explained.label != explanation.top.label:
        parts.insert(
            0,
            f"explained {explanation.explained.label} {percent(explanation.explained.probability)}",
        )
    if explanation.disagreement is not None:
        parts.append(f"branches differ by {percent(explanation.disagreement)}")
    said = f"{explanation.top.label} {percent(explanation.top.probability)}"
    print(f"{explanation.image}  {said}  ({', '.join(parts)})  {explanation.picture}")


def _print_faithfulness(result: Faithfulness, out: str | None) -> None:
    from crossvit.report.deletion import CONTROLS

    rows, columns = result.grid
    print(
        f"maps of {result.run} on {result.n:,} {result.split} images of {result.data}, class: the model's own answer"
    )
    ends = f"{result.intact:.3f} with all cells, {result.emptied:.3f} with none"
    print(f"{rows}x{columns} cells, fill {result.fill}; probability {ends}")
    print(
        f"{'':26}{'deletion':>8}  {'better than random by':27}{'insertion':>9}  better than random by"
    )
    for score in result.scores:
        print(f"{score.kind:26}{score.deletion.area:8.3f}  {_gain(score, 'deletion'):27}{score.insertion.area:9.3f}  "
              f"{_gain(score, 'insertion')}")  # fmt: skip
    for score in result.scores[: -len(CONTROLS)]:
        missing = [
            way for way in ("deletion", "insertion") if getattr(score, f"{way}_verdict") != "better"
        ]
        if missing:
            said = ", ".join(f"{way}: {getattr(score, f'{way}_verdict')}" for way in missing)
            print(f"note  {score.kind} does not beat random maps ({said})")
    print(
        "areas under the mean probability; deletion is better low, insertion high; 95 % intervals over the images"
    )
    if out is not None:
        print(f"picture  {out}/faithfulness.png")


def _gain(score: MapScore, way: str) -> str:
    if score.kind == "random":
        return ""
    gain, interval = getattr(score, f"{way}_gain"), getattr(score, f"{way}_gain_interval")
    return f"{gain:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
