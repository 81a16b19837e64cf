"""The verb `crossvit evaluate`."""

from __future__ import annotations

from json import dumps

from crossvit.cli.switch import Switch


def evaluate(
    run: str,
    data: str,
    /,
    *,
    split: str | None = None,
    batch_size: int = 64,
    engine: str = "torch",
    precision: str = "auto",
    device: str = "auto",
    skip_bad: Switch = False,
    json: Switch = False,
) -> int:
    """Measure a run on labelled images.

    Parameters
    ----------
    run
        A run folder made by `crossvit train`.
    data
        As for `train`. Of data with val/ or test/ that part is taken, of the data the run was split from its held-out
        part, otherwise every image.
    split
        Take this part instead: train, val or test where the data has them, all where it has none, or held-out.
    batch_size
        Images a step.
    engine
        What computes: torch, onnxruntime, openvino, or auto, the fastest here by trial.
    precision
        auto (fp32), fp32 or bf16.
    device
        auto, cpu, cuda or mps.
    skip_bad
        Leave out images that cannot be decoded instead of stopping.
    json
        Print one JSON object on stdout.
    """
    import crossvit
    from crossvit.cli.terminal import counting, print_evaluation
    from crossvit.results import to_json

    with counting("evaluating") as progress:
        result = crossvit.evaluate(
            run,
            data,
            split=split,
            batch_size=batch_size,
            engine=engine,
            device=device,
            precision=precision,
            skip_bad=skip_bad,
            progress=progress,
        )
    if json:
        print(dumps(to_json(result), ensure_ascii=False, allow_nan=False))
    else:
        print_evaluation(result)
    return 0
