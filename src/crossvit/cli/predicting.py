"""The verb `crossvit predict`."""

from __future__ import annotations

from json import dumps

from crossvit.cli.switch import Switch


def predict(
    run: str,
    /,
    *paths: str,
    top_k: int = 5,
    engine: str = "torch",
    precision: str = "auto",
    device: str = "auto",
    json: Switch = False,
) -> int:
    """Classify images. Exits with 1 if one of them could not be read; the others are classified all the same.

    Parameters
    ----------
    run
        A run folder made by `crossvit train`.
    paths
        Image files, folders (searched through) or globs.
    top_k
        Classes to name for each image, the surest first.
    engine
        What computes: torch, onnxruntime, openvino, or auto, the fastest here by trial.
    precision
        auto (fp32), fp32 or bf16.
    device
        auto, cpu, cuda or mps.
    json
        Print one JSON object on stdout.
    """
    from crossvit.cli.terminal import print_prediction
    from crossvit.errors import UsageError
    from crossvit.prediction import Predictor, find_images
    from crossvit.results import to_json

    if not paths:
        raise UsageError("no image given: `crossvit predict RUN photo.jpg`, a folder, or a glob")
    images = find_images(paths)
    predictor = Predictor(run, top_k=top_k, engine=engine, device=device, precision=precision)
    failed = 0
    found = []
    for prediction in predictor.stream(images):
        failed += prediction.error is not None
        if json:
            found.append(to_json(prediction))
        else:
            print_prediction(prediction)
    if json:
        print(dumps({"run": run, "n": len(images), "failed": failed, "predictions": found}, ensure_ascii=False, allow_nan=False))
    return 1 if failed else 0
