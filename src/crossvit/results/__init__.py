"""The records that verbs return: frozen, plain, and the same for people (`crossvit ...`) and programs (`--json`).

Standard library and NumPy only; pictures are kept as encoded bytes and left out of JSON.
"""

from __future__ import annotations

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
from crossvit.results.explanation import BranchAnswer, Curve, Explanation, Faithfulness, MapScore, TokenMap
from crossvit.results.prediction import BatchPrediction, Label, Prediction
from crossvit.results.records import MULTI_LABEL, SINGLE_LABEL, branch_names, to_json
from crossvit.results.training import Epoch, Rehearsal, ScaledRun, TrainingResult

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
    "Rehearsal",
    "ReliabilityBin",
    "RiskPoint",
    "Robustness",
    "RunsCompared",
    "ScaledRun",
    "Selective",
    "ShardSummary",
    "SizeScore",
    "TokenMap",
    "TrainingResult",
    "branch_names",
    "to_json",
]
