"""Examples of a task as batches: counterfactual pairs, responses and labelled texts, the same in every process."""

from itrain.data.counterfactual import CounterfactualBatch as CounterfactualBatch
from itrain.data.counterfactual import IntervenedInputs as IntervenedInputs
from itrain.data.counterfactual import PairError as PairError
from itrain.data.counterfactual import Runs as Runs
from itrain.data.counterfactual import collate as collate
from itrain.data.labelled import LabelError as LabelError
from itrain.data.labelled import LabelledBatch as LabelledBatch
from itrain.data.labelled import LabelledDataModule as LabelledDataModule
from itrain.data.pairs import CounterfactualDataModule as CounterfactualDataModule
from itrain.data.responses import ResponseBatch as ResponseBatch
from itrain.data.responses import ResponseDataModule as ResponseDataModule
from itrain.data.splits import SplitDataModule as SplitDataModule
