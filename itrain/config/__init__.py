"""Configurations: what a command line or a saved folder asks for, composed, checked and written out."""

from itrain.config.checking import Configuration as Configuration
from itrain.config.composition import check as check
from itrain.config.composition import compose as compose
from itrain.config.composition import of_folder as of_folder
from itrain.config.composition import request as request
from itrain.shipped import group_choices as group_choices
from itrain.shipped import group_files as group_files
from itrain.shipped import recipe_files as recipe_files
from itrain.shipped import shipped_rows as shipped_rows
from itrain.signatures import ConfigError as ConfigError
