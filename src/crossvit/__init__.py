"""CrossViT: multi-scale vision transformers that exchange information by cross-attention.

    model = crossvit.create_model("crossvit_15_dagger_240")
    result = crossvit.fit(crossvit.load_recipe("small", data="photos/", out="runs/photos"))
    crossvit.Predictor("runs/photos")(["new.jpg"])

Every name below is imported when it is first used, so `import crossvit` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossvit.errors import CrossViTError
    from crossvit.evaluation.comparison import compare_runs
    from crossvit.evaluation.evaluator import evaluate
    from crossvit.explanation.explainer import Explainer, explain, mistake_maps
    from crossvit.explanation.faithfulness import check_maps
    from crossvit.factory import create_model
    from crossvit.fast.inference import optimize
    from crossvit.model.attention import record_attention
    from crossvit.model.config import BranchConfig, CrossViTConfig
    from crossvit.model.crossvit import CrossViT
    from crossvit.model.presets import list_models
    from crossvit.model.registry import register_block, register_fusion, register_tokeniser
    from crossvit.prediction.predictor import Predictor
    from crossvit.prediction.to_file import predict_to_file
    from crossvit.results import Evaluation, Explanation, Faithfulness, Prediction, TrainingResult
    from crossvit.train.loop import fit
    from crossvit.train.recipe import Recipe, load_recipe
    from crossvit.weights.load import load_weights

__version__ = "0.1.0"

_HOMES = {
    "BranchConfig": "crossvit.model.config",
    "CrossViT": "crossvit.model.crossvit",
    "CrossViTConfig": "crossvit.model.config",
    "CrossViTError": "crossvit.errors",
    "Evaluation": "crossvit.results",
    "Explainer": "crossvit.explanation.explainer",
    "Explanation": "crossvit.results",
    "Faithfulness": "crossvit.results",
    "Prediction": "crossvit.results",
    "Predictor": "crossvit.prediction.predictor",
    "Recipe": "crossvit.train.recipe",
    "TrainingResult": "crossvit.results",
    "check_maps": "crossvit.explanation.faithfulness",
    "compare_runs": "crossvit.evaluation.comparison",
    "create_model": "crossvit.factory",
    "evaluate": "crossvit.evaluation.evaluator",
    "explain": "crossvit.explanation.explainer",
    "fit": "crossvit.train.loop",
    "list_models": "crossvit.model.presets",
    "load_recipe": "crossvit.train.recipe",
    "load_weights": "crossvit.weights.load",
    "mistake_maps": "crossvit.explanation.explainer",
    "optimize": "crossvit.fast.inference",
    "predict_to_file": "crossvit.prediction.to_file",
    "record_attention": "crossvit.model.attention",
    "register_block": "crossvit.model.registry",
    "register_fusion": "crossvit.model.registry",
    "register_tokeniser": "crossvit.model.registry",
}

__all__ = [
    "BranchConfig",
    "CrossViT",
    "CrossViTConfig",
    "CrossViTError",
    "Evaluation",
    "Explainer",
    "Explanation",
    "Faithfulness",
    "Prediction",
    "Predictor",
    "Recipe",
    "TrainingResult",
    "__version__",
    "check_maps",
    "compare_runs",
    "create_model",
    "evaluate",
    "explain",
    "fit",
    "list_models",
    "load_recipe",
    "load_weights",
    "mistake_maps",
    "optimize",
    "predict_to_file",
    "record_attention",
    "register_block",
    "register_fusion",
    "register_tokeniser",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crossvit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
