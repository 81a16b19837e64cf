"""The records that verbs return: frozen, plain, the same for people and for programs (`--json`).

Standard library and NumPy only; pictures are encoded bytes and left out of JSON. A module is
imported when one of its names is first used: making forty dataclasses takes as long as classifying
a small picture.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossvit.results.bench import Bench, BenchRow, Growth
    from crossvit.results.comparison import ComparedRun, RunsCompared
    from crossvit.results.data import BrokenImage, DataCheck, ImagePair, PartCheck, ShardSummary
    from crossvit.results.evaluation import (
        BranchScore,
        Calibration,
        ClassScore,
        Comparison,
        CorruptionScore,
        Evaluation,
        Interval,
        LabelScore,
        Mistake,
        MultiLabel,
        ReliabilityBin,
        RiskPoint,
        Robustness,
        Selective,
        SizeScore,
    )
    from crossvit.results.explanation import (
        BranchAnswer,
        Curve,
        Explanation,
        Faithfulness,
        MapScore,
        TokenMap,
    )
    from crossvit.results.prediction import BatchPrediction, Label, Prediction
    from crossvit.results.records import branch_names, plain_name, to_json
    from crossvit.results.run_record import (
        MULTI_LABEL,
        SINGLE_LABEL,
        DataRecord,
        ResultRecord,
        RunRecord,
    )
    from crossvit.results.training import DryRun, Epoch, ScaledRun, TrainingResult

_NAMES = {  # of each module
    "bench": "Bench BenchRow Growth",
    "comparison": "ComparedRun RunsCompared",
    "data": "BrokenImage DataCheck ImagePair PartCheck ShardSummary",
    "evaluation": "BranchScore Calibration ClassScore Comparison CorruptionScore Evaluation "
    "Interval LabelScore Mistake MultiLabel ReliabilityBin RiskPoint Robustness Selective "
    "SizeScore",
    "explanation": "BranchAnswer Curve Explanation Faithfulness MapScore TokenMap",
    "prediction": "BatchPrediction Label Prediction",
    "records": "branch_names plain_name to_json",
    "run_record": "MULTI_LABEL SINGLE_LABEL DataRecord ResultRecord RunRecord",
    "training": "Epoch DryRun ScaledRun TrainingResult",
}
_HOMES = {
    name: f"crossvit.results.{module}" for module, names in _NAMES.items() for name in names.split()
}

__all__ = [
    "MULTI_LABEL",
    "SINGLE_LABEL",
    "BatchPrediction",
    "Bench",
    "BenchRow",
    "BranchAnswer",
    "BranchScore",
    "BrokenImage",
    "Calibration",
    "ClassScore",
    "ComparedRun",
    "Comparison",
    "CorruptionScore",
    "Curve",
    "DataCheck",
    "DataRecord",
    "DryRun",
    "Epoch",
    "Evaluation",
    "Explanation",
    "Faithfulness",
    "Growth",
    "ImagePair",
    "Interval",
    "Label",
    "LabelScore",
    "MapScore",
    "Mistake",
    "MultiLabel",
    "PartCheck",
    "Prediction",
    "ReliabilityBin",
    "ResultRecord",
    "RiskPoint",
    "Robustness",
    "RunRecord",
    "RunsCompared",
    "ScaledRun",
    "Selective",
    "ShardSummary",
    "SizeScore",
    "TokenMap",
    "TrainingResult",
    "branch_names",
    "plain_name",
    "to_json",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crossvit.results' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
