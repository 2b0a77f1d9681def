"""Exports: what a training leaves for others, and what others left."""

from itrain.sharing.bases import require_model as require_model
from itrain.sharing.exports import export as export
from itrain.sharing.exports import load_weights as load_weights
from itrain.sharing.hub import HubError as HubError
from itrain.sharing.hub import list_exports as list_exports
from itrain.sharing.hub import load as load
from itrain.sharing.merging import Merged as Merged
from itrain.sharing.merging import MergeError as MergeError
from itrain.sharing.merging import merge as merge
from itrain.sharing.pushing import push_to_hub as push_to_hub
from itrain.sharing.reading import CONFIG as CONFIG
from itrain.sharing.reading import EXPORT as EXPORT
from itrain.sharing.reading import WEIGHTS as WEIGHTS
from itrain.sharing.reading import ExportError as ExportError
from itrain.sharing.reading import limited_to as limited_to
from itrain.sharing.reading import read_config as read_config
from itrain.sharing.reading import read_shapes as read_shapes
