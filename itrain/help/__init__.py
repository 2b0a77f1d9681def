"""What the command line says about itself: the help of each verb; lists of what there is are in ``listing``."""

from itrain.help.texts import HELP as HELP
from itrain.help.texts import SHORT as SHORT
from itrain.help.texts import VERBS as VERBS
from itrain.help.texts import help_on as help_on
