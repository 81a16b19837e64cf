"""The teacher of distillation, by name: any timm model, or a run of ours."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from crossvit.data.preprocess import Preprocessing
from crossvit.errors import UsageError, WeightsError, unknown_name
from crossvit.factory import create_model
from crossvit.model.config import CrossViTConfig
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.losses import NormalisedAnew, Teacher
from crossvit.train.setup import PreparedRun
from crossvit.weights.hub import HUB_FILE, hub_address, in_hubs_cache, knock

TIMM = "timm:"
A_CALLABLE = "a callable"  # recorded as the teacher of a run whose teacher was given in Python


def load_teacher(
    name: str, plan: PreparedRun, callback: Callback, *, device: torch.device
) -> Teacher:
    """`timm:NAME` (pretrained; `timm:local-dir:FOLDER` too) or a run folder, behind its own normalisation and input size. A timm
    model is taken to answer as the data asks: with one class, or with a sigmoid a class. `callback` is told what is fetched.

    UsageError for a name that is neither, or a teacher of other classes, channels or another task than the plan's; WeightsError
    for weights that cannot be fetched.
    """
    student = plan.preprocessing
    if name.startswith(TIMM):
        model, own, classes = _timm_teacher(name.removeprefix(TIMM), callback)
        fits = classes == len(plan.train.classes)
        known = f"{classes} classes"
    elif Run(name).exists():
        run = Run(name)
        record = run.finished_record()
        model = create_model(CrossViTConfig.from_dict(record.config), weights=run.path)
        own = Preprocessing.from_dict(record.preprocessing)
        fits = record.classes == plan.train.classes
        known = ", ".join(record.classes[:5])
        if record.task != plan.train.task:
            raise UsageError(
                f"the teacher {name} is {record.task} and {plan.data.location} {plan.train.task}"
            )
    elif name == A_CALLABLE:
        raise UsageError(
            "this run's teacher was given in Python: go on with crossvit.fit(recipe, resume=True, teacher=...)"
        )
    else:
        raise UsageError(f"teacher {name!r}: give timm:NAME, timm:local-dir:FOLDER or a run folder")
    if len(own.mean) != len(student.mean) or own.channels != student.channels:
        raise UsageError(
            f"the teacher {name} takes other channels than the student: leave out --channels or the teacher"
        )
    if not fits:
        raise UsageError(
            f"the teacher {name} answers for other classes ({known}) than {plan.data.location}"
        )
    teacher = NormalisedAnew(
        model,
        student=(student.mean, student.std),
        own=(own.mean, own.std),
        image_size=own.image_size,
    )
    return teacher.to(device).eval().requires_grad_(False)


def _timm_teacher(name: str, callback: Callback) -> tuple[torch.nn.Module, Preprocessing, int]:
    """(pretrained model, its preprocessing, its classes). UsageError for a name that timm has not, before anything is fetched;
    WeightsError, in one line, where its weights cannot be fetched or read."""
    import timm

    if ":" in name:  # local-dir:FOLDER, hf-hub:OWNER/NAME
        kind, _, place = name.partition(":")
        if kind == "local-dir" and not Path(place).is_dir():
            raise UsageError(f"teacher {TIMM}{name}: no folder {place}")
    elif not timm.is_model(name):
        raise unknown_name(
            "teacher",
            f"{TIMM}{name}",
            [f"{TIMM}{one}" for one in timm.list_models()],
            listing="timm.list_models()",
        )
    try:
        with _errors_alone():
            address = _fetched_from(name)
            if address is not None:
                callback.on_message(f"fetch  the weights of {TIMM}{name} from {address}")
                knock(address)
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # no network, no pretrained weights, a damaged folder: whatever hub, safetensors or timm raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"the weights of the teacher {TIMM}{name} cannot be had ({reason}): timm:local-dir:FOLDER takes some that are here"
        ) from error
    config = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined,no-untyped-call]
    height, width = config["input_size"][-2:]
    own = Preprocessing(
        image_size=(height, width), mean=tuple(config["mean"]), std=tuple(config["std"])
    )
    return model, own, int(model.num_classes)  # type: ignore[arg-type]


def _fetched_from(name: str) -> str | None:
    """The address on the hub that timm will fetch `name` from; None where it is here already, or lies elsewhere."""
    import timm

    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
    elif ":" in name or not (config := timm.get_pretrained_cfg(name)) or not config.hf_hub_id:
        return None
    else:
        repository = config.hf_hub_id
    repository, _, revision = repository.partition("@")
    here = in_hubs_cache(repository, (HUB_FILE, "pytorch_model.bin"), revision=revision or "main")
    return None if here else hub_address(repository)


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    """Inside, those who fetch say nothing of each try: what comes of them is in the error."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm", "urllib3")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
