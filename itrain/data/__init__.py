"""Examples of a task as batches: counterfactual pairs and responses, the same in every process."""

from itrain.data.counterfactual import CounterfactualBatch as CounterfactualBatch
from itrain.data.counterfactual import IntervenedInputs as IntervenedInputs
from itrain.data.counterfactual import PairError as PairError
from itrain.data.counterfactual import Runs as Runs
from itrain.data.counterfactual import collate as collate
from itrain.data.pairs import CounterfactualDataModule as CounterfactualDataModule
from itrain.data.responses import ResponseBatch as ResponseBatch
from itrain.data.responses import ResponseDataModule as ResponseDataModule
from itrain.data.splits import SplitDataModule as SplitDataModule
