"""Where the components of transformers' models are, and how sites are located in a model."""

from itrain.architectures.locating import WHOLE_ENDS as WHOLE_ENDS
from itrain.architectures.locating import Location as Location
from itrain.architectures.locating import architecture as architecture
from itrain.architectures.locating import blocks as blocks
from itrain.architectures.locating import has as has
from itrain.architectures.locating import heads_of as heads_of
from itrain.architectures.locating import layers as layers
from itrain.architectures.locating import locate as locate
from itrain.architectures.locating import otherwise_described as otherwise_described
from itrain.architectures.locating import require_components as require_components
from itrain.architectures.locating import unwrap as unwrap
from itrain.architectures.registering import bind_row as bind_row
from itrain.architectures.registering import described_row as described_row
from itrain.architectures.registering import parse_row as parse_row
from itrain.architectures.registering import register_architecture as register_architecture
from itrain.architectures.registering import row_of_type as row_of_type
from itrain.architectures.table import ARCHITECTURES as ARCHITECTURES
from itrain.architectures.table import Architecture as Architecture
from itrain.architectures.table import Component as Component
