"""Exports: what a training leaves for others, and what others left."""

from itrain.sharing.exports import CONFIG as CONFIG
from itrain.sharing.exports import EXPORT as EXPORT
from itrain.sharing.exports import WEIGHTS as WEIGHTS
from itrain.sharing.exports import ExportError as ExportError
from itrain.sharing.exports import export as export
from itrain.sharing.exports import limited_to as limited_to
from itrain.sharing.exports import load_weights as load_weights
from itrain.sharing.exports import read_config as read_config
from itrain.sharing.exports import read_shapes as read_shapes
from itrain.sharing.exports import require_model as require_model
from itrain.sharing.hub import HubError as HubError
from itrain.sharing.hub import list_exports as list_exports
from itrain.sharing.hub import load as load
from itrain.sharing.merging import Merged as Merged
from itrain.sharing.merging import MergeError as MergeError
from itrain.sharing.merging import merge as merge
from itrain.sharing.pushing import push_to_hub as push_to_hub
