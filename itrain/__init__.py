"""itrain trains interventions on neural networks: where and how does a network represent a variable?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from itrain.architectures import register_architecture as register_architecture
    from itrain.causal_model import CausalModel as CausalModel
    from itrain.data import CounterfactualBatch as CounterfactualBatch
    from itrain.data import CounterfactualDataModule as CounterfactualDataModule
    from itrain.data import ResponseDataModule as ResponseDataModule
    from itrain.data.labelled import LabelledDataModule as LabelledDataModule
    from itrain.detectors import Detector as Detector
    from itrain.detectors import DirectionDetector as DirectionDetector
    from itrain.detectors import ProbeDetector as ProbeDetector
    from itrain.detectors import RandomDirection as RandomDirection
    from itrain.inputs import ModelInputs as ModelInputs
    from itrain.interventions.ablation import Mean as Mean
    from itrain.interventions.ablation import Zero as Zero
    from itrain.interventions.base import Intervention as Intervention
    from itrain.interventions.blocks import FixedBlocks as FixedBlocks
    from itrain.interventions.boundless_das import BoundlessDAS as BoundlessDAS
    from itrain.interventions.controls import FullVector as FullVector
    from itrain.interventions.controls import RandomSubspace as RandomSubspace
    from itrain.interventions.das import DAS as DAS
    from itrain.interventions.das import FullRotationDAS as FullRotationDAS
    from itrain.interventions.directions import LinearDiscriminant as LinearDiscriminant
    from itrain.interventions.directions import MeanDifference as MeanDifference
    from itrain.interventions.directions import PrincipalDirections as PrincipalDirections
    from itrain.interventions.erasure import Erasure as Erasure
    from itrain.interventions.featurizers import Featurizer as Featurizer
    from itrain.interventions.featurizers import Identity as Identity
    from itrain.interventions.featurizers import Rotation as Rotation
    from itrain.interventions.featurizers import Subspace as Subspace
    from itrain.interventions.fixed import AddVector as AddVector
    from itrain.interventions.fixed import Clamp as Clamp
    from itrain.interventions.fixed import Neurons as Neurons
    from itrain.interventions.fixed import Noise as Noise
    from itrain.interventions.fixed import Scale as Scale
    from itrain.interventions.fixed import Subtract as Subtract
    from itrain.interventions.masking import HardConcreteGate as HardConcreteGate
    from itrain.interventions.masking import Mask as Mask
    from itrain.interventions.masking import SigmoidGate as SigmoidGate
    from itrain.interventions.onion import Onion as Onion
    from itrain.interventions.parts import GivenSubspace as GivenSubspace
    from itrain.interventions.parts import parts_of_subspace as parts_of_subspace
    from itrain.interventions.reft import ConsReFT as ConsReFT
    from itrain.interventions.reft import DiReFT as DiReFT
    from itrain.interventions.reft import LobiReFT as LobiReFT
    from itrain.interventions.reft import LoReFT as LoReFT
    from itrain.interventions.reft import NoReFT as NoReFT
    from itrain.interventions.rescaling import RED as RED
    from itrain.interventions.revnet import RevNet as RevNet
    from itrain.interventions.revnet import RevNetDAS as RevNetDAS
    from itrain.interventions.steering import SteeringDirection as SteeringDirection
    from itrain.interventions.steering import SteeringVector as SteeringVector
    from itrain.metrics import InterchangeAccuracy as InterchangeAccuracy
    from itrain.models import BaseModel as BaseModel
    from itrain.models import load_embedded as load_embedded
    from itrain.models import load_minilm as load_minilm
    from itrain.models import load_pooled as load_pooled
    from itrain.models import load_pretrained as load_pretrained
    from itrain.networks.attached import AttachedEdits as AttachedEdits
    from itrain.networks.base import Network as Network
    from itrain.networks.choose import make_network as make_network
    from itrain.networks.hooks import HookedNetwork as HookedNetwork
    from itrain.networks.lane import EditAt as EditAt
    from itrain.placements import Placement as Placement
    from itrain.probes import LinearProbe as LinearProbe
    from itrain.probes import MLPProbe as MLPProbe
    from itrain.probes import Probe as Probe
    from itrain.results.table import read_results as read_results
    from itrain.runs.activations import Activations as Activations
    from itrain.runs.run import Run as Run
    from itrain.sharing import export as export
    from itrain.sharing import list_exports as list_exports
    from itrain.sharing import load as load
    from itrain.sharing import merge as merge
    from itrain.sharing import push_to_hub as push_to_hub
    from itrain.sharing.foreign import ForeignError as ForeignError
    from itrain.sharing.foreign import load_gguf as load_gguf
    from itrain.sharing.foreign import load_mib as load_mib
    from itrain.sharing.foreign import load_pyvene as load_pyvene
    from itrain.sharing.foreign import save_easysteer as save_easysteer
    from itrain.sharing.foreign import save_gguf as save_gguf
    from itrain.sharing.foreign import save_mib as save_mib
    from itrain.sites import Site as Site
    from itrain.tasks.axbench import AxBench as AxBench
    from itrain.tasks.axbench import AxBenchTexts as AxBenchTexts
    from itrain.tasks.base import ClassTask as ClassTask
    from itrain.tasks.base import Pair as Pair
    from itrain.tasks.base import Task as Task
    from itrain.tasks.base import TextTask as TextTask
    from itrain.tasks.digits_pvr import DigitsPVR as DigitsPVR
    from itrain.tasks.entity_attributes import EntityAttributes as EntityAttributes
    from itrain.tasks.gender import Gender as Gender
    from itrain.tasks.hierarchical_equality import HierarchicalEquality as HierarchicalEquality
    from itrain.tasks.instructions import Instructions as Instructions
    from itrain.tasks.labelled import LabelledTask as LabelledTask
    from itrain.tasks.labelled_texts import LabelledTexts as LabelledTexts
    from itrain.tasks.modular_squares import ModularSquares as ModularSquares
    from itrain.tasks.price_tagging import PriceTagging as PriceTagging
    from itrain.tasks.response_style import ResponseStyle as ResponseStyle
    from itrain.tasks.responses import ResponseTask as ResponseTask
    from itrain.tasks.sentences import Sentences as Sentences
    from itrain.tasks.sequences import Sequences as Sequences
    from itrain.training.alignment import AlignmentSearch as AlignmentSearch
    from itrain.training.base import Training as Training
    from itrain.training.building import count_features as count_features
    from itrain.training.callbacks import FirstStepError as FirstStepError
    from itrain.training.callbacks import Preparation as Preparation
    from itrain.training.callbacks import Schedules as Schedules
    from itrain.training.cohort import Cohort as Cohort
    from itrain.training.finetuning import LoRAFinetuning as LoRAFinetuning
    from itrain.training.finetuning import RepresentationFinetuning as RepresentationFinetuning
    from itrain.training.finite import FirstStepCheck as FirstStepCheck
    from itrain.training.iit import InterchangeInterventionTraining as InterchangeInterventionTraining
    from itrain.training.interchange import Interchange as Interchange
    from itrain.training.iti import InferenceTimeIntervention as InferenceTimeIntervention
    from itrain.training.monitor import Monitor as Monitor
    from itrain.training.monitor import Reading as Reading
    from itrain.training.monitoring import Monitoring as Monitoring
    from itrain.training.probing import ProbeTraining as ProbeTraining
    from itrain.training.steering import Steering as Steering
    from itrain.training.tracing import CausalTracing as CausalTracing
    from itrain.verbs import Fit as Fit
    from itrain.verbs import Sweep as Sweep
    from itrain.verbs import fit as fit
    from itrain.verbs import sweep as sweep

__version__ = "0.1.0"

_HOMES = {
    "register_architecture": "architectures",
    "Sweep": "verbs",
    "Fit": "verbs",
    "sweep": "verbs",
    "fit": "verbs",
    "Activations": "runs.activations",
    "Run": "runs.run",
    "Scale": "interventions.fixed",
    "Clamp": "interventions.fixed",
    "Subtract": "interventions.fixed",
    "RED": "interventions.rescaling",
    "Noise": "interventions.fixed",
    "Neurons": "interventions.fixed",
    "AddVector": "interventions.fixed",
    "CausalModel": "causal_model",
    "CounterfactualBatch": "data",
    "CounterfactualDataModule": "data",
    "ResponseDataModule": "data",
    "ModelInputs": "inputs",
    "Mean": "interventions.ablation",
    "Zero": "interventions.ablation",
    "Intervention": "interventions.base",
    "FixedBlocks": "interventions.blocks",
    "BoundlessDAS": "interventions.boundless_das",
    "FullVector": "interventions.controls",
    "RandomSubspace": "interventions.controls",
    "DAS": "interventions.das",
    "FullRotationDAS": "interventions.das",
    "LinearDiscriminant": "interventions.directions",
    "MeanDifference": "interventions.directions",
    "PrincipalDirections": "interventions.directions",
    "Erasure": "interventions.erasure",
    "Featurizer": "interventions.featurizers",
    "Identity": "interventions.featurizers",
    "Rotation": "interventions.featurizers",
    "Subspace": "interventions.featurizers",
    "Onion": "interventions.onion",
    "GivenSubspace": "interventions.parts",
    "parts_of_subspace": "interventions.parts",
    "HardConcreteGate": "interventions.masking",
    "Mask": "interventions.masking",
    "SigmoidGate": "interventions.masking",
    "ConsReFT": "interventions.reft",
    "DiReFT": "interventions.reft",
    "LobiReFT": "interventions.reft",
    "LoReFT": "interventions.reft",
    "NoReFT": "interventions.reft",
    "RevNet": "interventions.revnet",
    "RevNetDAS": "interventions.revnet",
    "SteeringDirection": "interventions.steering",
    "SteeringVector": "interventions.steering",
    "InterchangeAccuracy": "metrics",
    "BaseModel": "models",
    "load_embedded": "models",
    "load_minilm": "models",
    "load_pooled": "models",
    "load_pretrained": "models",
    "Detector": "detectors",
    "DirectionDetector": "detectors",
    "ProbeDetector": "detectors",
    "RandomDirection": "detectors",
    "LabelledDataModule": "data.labelled",
    "LabelledTexts": "tasks.labelled_texts",
    "LabelledTask": "tasks.labelled",
    "Monitor": "training.monitor",
    "Reading": "training.monitor",
    "Monitoring": "training.monitoring",
    "AttachedEdits": "networks.attached",
    "Network": "networks.base",
    "make_network": "networks.choose",
    "HookedNetwork": "networks.hooks",
    "EditAt": "networks.lane",
    "LinearProbe": "probes",
    "MLPProbe": "probes",
    "Probe": "probes",
    "export": "sharing",
    "list_exports": "sharing",
    "load": "sharing",
    "merge": "sharing",
    "push_to_hub": "sharing",
    "ForeignError": "sharing.foreign",
    "load_gguf": "sharing.foreign",
    "load_mib": "sharing.foreign",
    "load_pyvene": "sharing.foreign",
    "save_easysteer": "sharing.foreign",
    "save_gguf": "sharing.foreign",
    "save_mib": "sharing.foreign",
    "Site": "sites",
    "Placement": "placements",
    "read_results": "results.table",
    "AxBench": "tasks.axbench",
    "AxBenchTexts": "tasks.axbench",
    "ClassTask": "tasks.base",
    "Pair": "tasks.base",
    "Task": "tasks.base",
    "TextTask": "tasks.base",
    "DigitsPVR": "tasks.digits_pvr",
    "EntityAttributes": "tasks.entity_attributes",
    "Gender": "tasks.gender",
    "HierarchicalEquality": "tasks.hierarchical_equality",
    "ModularSquares": "tasks.modular_squares",
    "Instructions": "tasks.instructions",
    "PriceTagging": "tasks.price_tagging",
    "ResponseStyle": "tasks.response_style",
    "ResponseTask": "tasks.responses",
    "Sentences": "tasks.sentences",
    "Sequences": "tasks.sequences",
    "AlignmentSearch": "training.alignment",
    "Training": "training.base",
    "FirstStepCheck": "training.finite",
    "FirstStepError": "training.callbacks",
    "Preparation": "training.callbacks",
    "Schedules": "training.callbacks",
    "Cohort": "training.cohort",
    "LoRAFinetuning": "training.finetuning",
    "RepresentationFinetuning": "training.finetuning",
    "InterchangeInterventionTraining": "training.iit",
    "Interchange": "training.interchange",
    "InferenceTimeIntervention": "training.iti",
    "count_features": "training.building",
    "ProbeTraining": "training.probing",
    "Steering": "training.steering",
    "CausalTracing": "training.tracing",
}

__all__ = [*sorted(_HOMES), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load a public name at its first use: torch and transformers take seconds that ``import itrain`` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'itrain' has no attribute '{name}'")
    return getattr(import_module(f"itrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
