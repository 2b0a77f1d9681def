"""The help of each verb, as text of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

OF_VERBS: Mapping[str, str] = {
    "fit": """\
usage: itrain fit [recipe=<name or file>] [key=value ...]

Trains, tests, and writes to <output>/<name>/<time>/: config.yaml, metrics.csv,
metrics.json, checkpoints/, export/, figure.png. ckpt=<run folder or .ckpt> goes
on from a checkpoint, with the configuration of its run.

trainer.callbacks are Lightning's or your own, by name; trainer=early_stopping
is an example. If one of them is a ModelCheckpoint with a monitor, the best
checkpoint's weights are tested and exported, else the last ones.

examples
  itrain fit recipe=das_gender
  itrain fit recipe=das_gender intervention.rank=4 training.optimizer.lr=1e-3 seed=1
  itrain fit recipe=das_gender trainer=early_stopping trainer.callbacks.early_stopping.patience=3
  itrain fit ckpt=outputs/das_gender/2025-01-31_12-00-00 trainer.max_epochs=20

keys
  <part>=<choice>, <part>.<argument>=<value>
             parts are model, network, task, data, intervention, training,
             trainer and logger: itrain list <part>, or --help recipe=<name>
  site       where: layer2.block_output@name, a list of them, or site.layer=3
             site.position=last; site.read=<site> reads the sources elsewhere;
             {<variable>: <site>} has a site for each variable
  name       of the run's folder; without it, the recipe's
  output     the folder of all runs: outputs
  seed       of the data, their order and the start
  threads    of the CPU
  vacuity    repeats the fit on a false variable, a random model and with weaker
             maps; non-linear maps do unless false
""",
    "plan": """\
usage: itrain plan [recipe=<name or file>] [rate=<TFLOP/s>] [key=value ...]

Says what `itrain fit` with the same words would take, from the configuration
and the model's config.json alone, without weights or a network: the bytes of
weights, caches, optimizer and a step's tensors on one device at their peak, the
operations of a step, and what replay does. A configuration that a fit refuses
is refused in the same words. Sweeps are planned by one of their fits. What
kernels take within one operation, what the allocator rounds up or keeps, and
the interpreter itself, are not counted. Matrix products, convolutions and
attention count as operations. A step takes at least as long as these do at the
speed of one matrix product, timed on this machine or given as rate.

examples
  itrain plan recipe=das_gender
  itrain plan recipe=das_gender_pythia model=llama-3.1-8b trainer=fsdp trainer.devices=4 rate=300
""",
    "sweep": """\
usage: itrain sweep [recipe=<name or file>] [sweep.<key>=<value> ...] [key=value ...]
       itrain sweep resume=<folder> [launcher=<choice> ...]

Fits each method at each layer and position, and writes one table, heat maps and
report.html.

examples
  itrain sweep recipe=das_vs_probe_gender
  itrain sweep recipe=das_gender sweep.methods=[das,probing] sweep.layers="every(2)" sweep.seeds=[0,1,2]
  itrain sweep resume=outputs/das_vs_probe_gender/2025-01-31_12-00-00

keys
  sweep.methods
             names of interventions, probing, or monitoring
  sweep.layers
             all, every(2), or [2,4]
  sweep.positions
             all, or [name,last]
  sweep.components
             [block_output], of each layer
  sweep.window
             layers that are edited together
  sweep.ranks
             [1], of the methods that have one
  sweep.seeds
             [0]; each gives its own data, model and start
  sweep.patience
             epochs without a lower validation loss after which a fit stops
  sweep.random_model
             fits once more on a randomly initialised model, as a control
  sweep.control_task
             fits once more to arbitrary labels, for the selectivity of odds
  launcher   devices, joblib, slurm or ray; the other keys are those of fit,
             without site and intervention
""",
    "report": """\
usage: itrain report <folder> [<folder> ...] [output=<file>]

Writes a page for one finished fit or test, or one page for one or several
finished sweeps: report.html in the folder of a single one, else here. It opens
from disk, and each table and picture says how to read it.

examples
  itrain report outputs/das_gender/2025-01-31_12-00-00
  itrain report outputs/das_vs_probe_gender/2025-01-31_12-00-00 outputs/other/2025-01-31_13-00-00 output=both.html
""",
    "reproduce": """\
usage: itrain reproduce [<row> ...] [quick] [rows=<folder>] [output=<folder>]
       itrain reproduce --list [<row> ...] [rows=<folder>]

Runs the rows of a table of published and planted figures, quick ones first, and
shows ours beside them: mean and spread over seeds, minutes, hardware. Writes
table.json and report.html to <output>/reproduce/, and each seed's run to
<output>/reproduce/<row>/seed<n>/. What has run is kept: after Ctrl-C the same
command goes on where it stopped, and a row is run again only where its command,
the configuration that it asks for, or itrain's version has changed. A row that
misses its bounds or fails is said so, and the exit code is 1.

examples
  itrain reproduce --list
  itrain reproduce quick
  itrain reproduce das_gender boundless_das_price

keys
  quick      only the rows that take less than 20 seconds a seed
  --list     what rows there are, with their commands, and what those need that
             are not run here; or list
  rows       a folder with rows of your own, in place of those that ship with
             itrain: docs/results/reproduce.md
  output     the folder of all runs: outputs
""",
    "dashboard": """\
usage: itrain dashboard <folder> [<folder> ...] [entity=<team>] [project=<name>] [output=<file>]

Lays out the runs of finished sweeps as a W&B workspace: maps, their difference,
curves and controls. Saves it to W&B; with output=<file> it only writes the
definition.

examples
  itrain dashboard outputs/das_vs_probe_gender/2025-01-31_12-00-00 entity=my-team
  itrain dashboard outputs/das_vs_probe_gender/2025-01-31_12-00-00 output=dashboard.json
""",
    "test": """\
usage: itrain test ckpt=<run folder or .ckpt> [key=value ...]
       itrain test export=<folder> [key=value ...]

Tests the weights of a checkpoint or an export, with the configuration they were
trained with; other keys change it.

examples
  itrain test ckpt=outputs/das_gender/2025-01-31_12-00-00
  itrain test export=outputs/das_gender/2025-01-31_12-00-00/export data.test_pairs=1024 seed=1
""",
    "export": """\
usage: itrain export ckpt=<run folder or .ckpt> [to=<form>] [key=value ...]
       itrain export export=<folder or user/repo> to=<form> [output=<path>] [trust=[<package>]]

Writes the portable weights of a checkpoint, and prints their folder; or what a
checkpoint or an export holds in another form, and prints where that lies.

examples
  itrain export ckpt=outputs/das_gender/2025-01-31_12-00-00
  itrain export ckpt=outputs/das_gender/2025-01-31_12-00-00 to=hub repo=user/das-gender private=true
  itrain export export=outputs/steer_story/2025-01-31_12-00-00/export merge=true output=merged

keys
  to         folder (itrain's own, the default), hub, mib, gguf or easysteer
  repo       to=hub: user/name, or user/name/<export> in a repository of several
  private    to=hub: whether the repository is private; without it, as it is
  branch     to=hub: main without it
  merge      true folds what acts at all tokens into the weights of the base
             model, which is written, or pushed
  acts       all: with merge=true, also what was trained to act on the prompt
             alone
  everywhere true: to=gguf or easysteer, whose files act at all tokens,
             whatever the export acts at
""",
    "generate": """\
usage: itrain generate export=<folder> prompt="<text>" [prompt="<text>" ...] [key=value ...]

Continues prompts with the model as it was before, and with what an export of
any kind of training holds, side by side.

examples
  itrain generate export=outputs/reft_style/2025-01-31_12-00-00/export prompt="The bolbin is painted"
  itrain generate export=outputs/das_gender/2025-01-31_12-00-00/export prompt="{name=Lisa} jumped because" \\
      source="{name=John} walked because" max_new_tokens=6

keys
  prompts    a file with a prompt on each line
  source     the text that interchanged values come from, one for all prompts or
             one for each; source.<variable> where there are several variables.
             Where a site names a span, mark it: "{name=Lisa} jumped because"
  continuation
             what follows the source: a generated token gets what its token of
             the same number has
  acts       prompt, all (generated tokens too), generated, or some generated
             tokens: [0,2]
  strength   how much of an edit's effect is applied: base + strength *
             (edit(base) - base). 1 is what the export does: for steering, the
             strength that its test chose
  others     the fields of transformers' GenerationConfig: max_new_tokens=20
             do_sample=true temperature=0.7 num_beams=4; seed=<n> sets the draws
""",
    "describe": """\
usage: itrain describe export=<folder> [top=<count>] [key=value ...]
       itrain describe ckpt=<run folder or .ckpt> [top=<count>] [key=value ...]

Says what the directions along which the interventions move activations of the
test examples mean for the output: the tokens that each raises and lowers most,
by its projection on the vocabulary (the logit lens) and by the change of the
logits where the activation moves along it. Gur-Arieh et al. 2025, arXiv
2501.08319.

example
  itrain describe export=outputs/das_gender/2025-01-31_12-00-00/export top=5

keys
  top        how many tokens are printed: 8
""",
    "run": """\
usage: itrain run site=<site> base="<prompt>" [source="<prompt>"] [intervention=<name>] [key=value ...]

Runs a model once under an intervention, without any training, and prints the
likeliest next tokens of each prompt before and after it, with their
probabilities. Without intervention=, the source's activation is swapped in.

examples
  itrain run site=layer2.block_output@1 base="Mary walked because" source="John walked because"
  itrain run site=layer2.block_output@1 base="Mary walked because" intervention=scale intervention.factor=3
  itrain run site=layer2.mlp_activation@last dims=[1,2] base="Mary walked because" intervention=zero
  itrain run 'site=layer0.block_output@"Mary"' 'read=layer0.block_output@"John"' base="Mary walked because" \\
      source="John walked because"

keys
  site       where: layer2.block_output@last,
             layer2.attention_value_output.head3@1, or at a text of the prompt,
             'site=layer2.block_output@"Mary"' (in single quotes, which the
             shell takes off), or at a span that is marked in all prompts,
             "{name=Mary} walked": @name; several times for several sites
  read       the site that is read in the source, where it is another one
  base       the prompt; several times for several prompts
  source     the prompt that values are read from; one for all prompts, or one
             for each
  dims       the features that are edited: dims=[10,11,12]
  fit        a prompt to whose activations intervention=mean and its kind are
             fitted; several times for several
  strength   how much of the edit's effect is applied: base + strength *
             (edit(base) - base)
  top        how many tokens are printed: 5
  model, intervention, threads
             as for fit: itrain list intervention
""",
    "task": """\
usage: itrain task check <file>.yaml [model=<choice>] [task.<key>=<value> ...]
       itrain task check <table> [model=<choice>] [task=<choice>] [data.<key>=<value> ...]
       itrain task check <module>.<Class> [model=<choice>] [task.<key>=<value> ...]

Renders examples of each split with their spans, tokens and labels, and counts
pairs, labels and answers; or says all that is wrong with a task by line and
key, with a table of pairs by row and column, and ends with exit code 2. Of the
model only the tokenizer is loaded, and model=null goes without.
docs/howto/tasks.md says how a task is written.

examples
  itrain task check my/pairs.jsonl
  itrain task check my/addition.yaml
  itrain task check my/addition.yaml model=hf model.name=path/to/model task.changing=1
  itrain task check my_task.Pronoun model=hf model.name=path/to/model
""",
    "show": """\
usage: itrain show [key=value ...]

Prints the configuration that `itrain fit` with the same words would run, with
every default that acts. Nothing runs.

example
  itrain show recipe=das_gender intervention.rank=4
""",
    "list": """\
usage: itrain list [<part> or <family>]
       itrain list <user/repo>[@<revision>]

Lists recipes and choices with a line each; or the exports in a repository of
the hub. Lines are cut to a terminal's width, and whole in a pipe.

examples
  itrain list
  itrain list interventions
  itrain list recipes
  itrain list components

keys
  a part     recipe, model, task, data, intervention, training, trainer, ...
  a family   objective, featurizer, gate, probe, detector, judge, metric,
             component, position; the plural of each will do
""",
    "explain": """\
usage: itrain explain <site> [base="<prompt>"] [key=value ...]
       itrain explain <class, recipe, choice, component or position>
       itrain explain <part>=<choice>

Says what a site is: its module, shape and heads, the tokens that it names, and
which later layers and tokens an edit there can reach. Of transformers' models
the config.json is enough. Of a name it says what the class does and takes.
Without base, a site is tried on an example of the recipe or task that you name.

examples
  itrain explain layer2.block_output@last base="Mary walked because"
  itrain explain layer5.attention_value_output.head3@last model=gpt2
  itrain explain module:gpt_neox.layers.1.mlp.output
  itrain explain DAS

keys
  base       a prompt: its tokens are shown, those that the site names in []
  others     those of fit, such as recipe=<name> and model=<choice>
""",
    "doctor": """\
usage: itrain doctor

Checks versions, devices, folders, extras and settings of this machine, without
the network, and runs one interchange. The exit code is 1 if something is
broken, else 0.

example
  itrain doctor
""",
    "completion": """\
usage: itrain completion bash|zsh|fish

Prints a script that completes verbs, recipes, choices and keys in a shell.

examples
  source <(itrain completion bash)               # in ~/.bashrc
  source <(itrain completion zsh)                # in ~/.zshrc
  itrain completion fish > ~/.config/fish/completions/itrain.fish
""",
}
"""What ``itrain <verb> --help`` prints, before the syntax."""
