"""itrain trains interventions on neural networks: where and how does a network represent a variable?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from itrain.causal_model import CausalModel as CausalModel
    from itrain.data import CounterfactualBatch as CounterfactualBatch
    from itrain.data import CounterfactualDataModule as CounterfactualDataModule
    from itrain.inputs import ModelInputs as ModelInputs
    from itrain.interventions.boundless_das import BoundlessDAS as BoundlessDAS
    from itrain.interventions.das import DAS as DAS
    from itrain.interventions.das import FullRotationDAS as FullRotationDAS
    from itrain.interventions.masking import Mask as Mask
    from itrain.interventions.reft import LoReFT as LoReFT
    from itrain.metrics import InterchangeAccuracy as InterchangeAccuracy
    from itrain.models import BaseModel as BaseModel
    from itrain.models import load_embedded as load_embedded
    from itrain.models import load_pretrained as load_pretrained
    from itrain.networks.hooks import HookedNetwork as HookedNetwork
    from itrain.responses import ResponseDataModule as ResponseDataModule
    from itrain.results.table import read_results as read_results
    from itrain.sharing import export as export
    from itrain.sharing import load as load
    from itrain.sites import Site as Site
    from itrain.tasks.base import Pair as Pair
    from itrain.tasks.base import Task as Task
    from itrain.tasks.base import TextTask as TextTask
    from itrain.training.alignment import AlignmentSearch as AlignmentSearch
    from itrain.training.cohort import Cohort as Cohort
    from itrain.training.finetuning import RepresentationFinetuning as RepresentationFinetuning
    from itrain.training.iit import InterchangeInterventionTraining as InterchangeInterventionTraining
    from itrain.training.probing import ProbeTraining as ProbeTraining

__version__ = "0.1.0"

_HOMES = {
    "CausalModel": "causal_model",
    "CounterfactualBatch": "data",
    "CounterfactualDataModule": "data",
    "ModelInputs": "inputs",
    "BoundlessDAS": "interventions.boundless_das",
    "DAS": "interventions.das",
    "FullRotationDAS": "interventions.das",
    "Mask": "interventions.masking",
    "LoReFT": "interventions.reft",
    "InterchangeAccuracy": "metrics",
    "BaseModel": "models",
    "load_embedded": "models",
    "load_pretrained": "models",
    "HookedNetwork": "networks.hooks",
    "ResponseDataModule": "responses",
    "export": "sharing",
    "load": "sharing",
    "Site": "sites",
    "read_results": "results.table",
    "Pair": "tasks.base",
    "Task": "tasks.base",
    "TextTask": "tasks.base",
    "AlignmentSearch": "training.alignment",
    "Cohort": "training.cohort",
    "RepresentationFinetuning": "training.finetuning",
    "InterchangeInterventionTraining": "training.iit",
    "ProbeTraining": "training.probing",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name at its first use: torch and transformers take seconds that ``import itrain`` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'itrain' has no attribute '{name}'")
    return getattr(import_module(f"itrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
