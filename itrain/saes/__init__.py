"""Sparse autoencoders from files and from training, as featurizers."""

from itrain.saes.layouts import SAEError as SAEError
from itrain.saes.layouts import read_dictionary as read_dictionary
from itrain.saes.source import SAE as SAE
from itrain.saes.tiny_world import TinyWorldSAE as TinyWorldSAE
from itrain.saes.training import TrainedSAE as TrainedSAE
from itrain.saes.training import train_sae as train_sae
from itrain.saes.training import write_sae as write_sae
