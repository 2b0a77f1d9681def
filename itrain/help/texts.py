"""The help at the prompt: of itrain as a whole, and of a verb with the keys that words compose."""

from __future__ import annotations

from collections.abc import Sequence

from itrain.help.verbs import OF_VERBS

_SYNTAX = """\
After the verb comes Hydra's syntax: key=value, group=choice, +key=value, ~key.
Recipes in ./recipes add to those that ship with itrain and win over them.
--quiet prints results only; --debug (or ITRAIN_DEBUG=1) keeps tracebacks.
"""

HELP = f"""\
usage: itrain <verb> [key=value ...]        (or python -m itrain ...)

train
  fit        train and evaluate; write checkpoint, export, metrics and figure
  sweep      compare methods x layers x positions x seeds: table, heat maps
  reproduce  run the table of published and planted figures
use what was trained
  test       evaluate a checkpoint or an export
  generate   continue prompts before and after training
  describe   say which tokens an export's directions raise and lower
  export     write portable weights, merge them, or share them
  report     one page for a finished run, or for one or several sweeps
  dashboard  lay out finished sweeps in W&B
look before a run
  run        run a model once under an intervention, without training
  explain    say what a site, an intervention, a recipe or a metric is
  show       print the configuration that a fit would run
  plan       say what memory and operations a fit takes
  task       check a file of a task or of pairs
find your way
  list       list recipes, choices, classes, components and positions
  doctor     check this machine: versions, devices, folders, extras
  completion print a completion script for bash, zsh or fish

examples
  itrain fit recipe=das_gender
  itrain sweep recipe=das_vs_probe_gender sweep.layers=[2,4]
  itrain explain layer2.block_output@last base="Mary walked because"

itrain <verb> --help says what a verb takes; itrain --version the version.
The documentation is in docs/, and begins with docs/index.md.

{_SYNTAX}"""

SHORT = """\
itrain trains interventions on neural networks.
Try itrain fit recipe=das_gender. itrain --help lists the verbs; itrain list the recipes; itrain doctor checks.
"""

VERBS = tuple(OF_VERBS)
_COMPOSING = ("fit", "sweep", "show", "plan")


def help_on(words: Sequence[str]) -> str:
    """The help on a verb, or on all of them where there are no words.

    Raises:
        ConfigError: there is no such verb, or another word is given, which does nothing there or composes no run.
    """
    from itrain.help.keys import key_lines
    from itrain.signatures import ConfigError, nearest

    verb, *others = words or [""]
    if verb and verb not in VERBS:
        raise ConfigError(f"there is no verb '{verb}'{nearest(verb, VERBS)}")
    if others and verb in _COMPOSING:
        return "\n".join([OF_VERBS[verb], *key_lines(others, sweeps=verb == "sweep"), "", _SYNTAX])
    if others and [verb, *others] != ["task", "check"]:
        raise ConfigError(f"'{others[0]}' does nothing beside --help: itrain {verb} --help")
    return f"{OF_VERBS[verb]}\n{_SYNTAX}" if verb else HELP
