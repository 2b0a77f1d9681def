"""Wrong command lines: each is one line that names the thing at fault, and leaves nothing behind."""

from __future__ import annotations

import functools
import io
import shlex
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException

from itrain import cli, models
from itrain.interventions.base import Intervention
from itrain.tasks.gender import Gender

SMALL = (
    *("trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"),
    *("data.train_pairs=8", "data.validation_pairs=4", "data.test_pairs=4"),
)
HERE = __name__
DAS = "itrain.interventions.das.DAS"
STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


class Raises(Gender):
    def __init__(self) -> None:
        raise KeyError("mine")


class Explodes(Intervention):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        raise ZeroDivisionError("boom")

    def forward(self, base: object, source: object) -> object:  # type: ignore[override]
        return base


def no_model() -> models.BaseModel: ...


# Refused before anything is built: `itrain show` with these words.
CHECKED = """
seed=-1                                 | seed: expected 0 to 4294967295, not -1
seed=99999999999999999999               | seed: 99999999999999999999 does not fit in 64 bits
seed=9999999999                         | seed: expected 0 to
data.batch_size=99999999999999999999    | data.batch_size: 99999999999999999999 does not fit
seed=nan                                | seed: expected a finite number, not nan
seed=[0,1]                              | seed: expected an integer, not [0, 1]
seed=0,1                                | several seeds are sweep.seeds=[0,1]
seed=null                               | seed: expected an integer, not null
seed=1.5                                | seed: expected an integer
seed=${seed}                            | Recursive interpolation
seed=${nope}                            | 'nope' not found
name=${oc.env:NOPE}                     | 'NOPE' not found
name=[1,2]                              | name: expected text
name=''                                 | name is empty; add name=<name>
output=                                 | output is empty
output=null                             | output: expected text, not null
ckpt=                                   | ckpt is empty; add ckpt=<path>
threads=x                               | threads: expected an integer
threads=1.5                             | threads: expected an integer
site=null                               | site: none is given
site={}                                 | site.component has no value
site={layer:2}                          | site.component has no value
site=5                                  | site: expected text
site=[null]                             | site: expected text
site=layer-1.block_output@name          | site 'layer-1.block_output@name'
site.head=-1                            | site 'layer2.block_output.head-1@name'
~site                                   | site has no value
task=null                               | task: none is given; choose one with task=<choice>
model=null                              | model: none is given
network=null                            | network: none is given
data=null                               | data: none is given
training=null                           | training: none is given
trainer=null                            | trainer: none is given
intervention=null                       | intervention: none is given; AlignmentSearch needs one
~intervention                           | intervention: none is given
~seed                                   | seed has no value
~nope                                   | 'nope' does not exist
=3                                      | '=3' cannot be read
+seed=3                                 | already at 'seed'
a.b=3                                   | a: no such key
versions={}                             | versions: a run writes it down itself
commit=x                                | commit: a run writes it down itself
recipe=[das_gender,nope]                | there is no recipe 'nope'
recipe={a:1}                            | recipe=<name> makes a choice
training.optimizer.lr=nan               | training.optimizer.lr: expected a finite number, not nan
training.optimizer.lr=inf               | training.optimizer.lr: expected a finite number, not inf
training.optimizer.lr=-inf              | training.optimizer.lr: expected a finite number
training.optimizer.lr=1e38              | training.optimizer.lr: 1e+38 is more than float32 can work with
training.optimizer.eps=1e308            | training.optimizer.eps: 1e+308 is more than float32
training=probing training.l2=[-1e39]    | training.l2[0]: -1e+39 is more than float32
training.optimizer.betas=[0.9,nan]      | training.optimizer.betas[1]: expected a finite number
training.warmup=nan                     | training.warmup: expected a finite number
training.isolate_weight=inf             | training.isolate_weight: expected a finite number
network.budget_gib=nan                  | network.budget_gib: expected a finite number
task.changing=nan                       | task.changing: expected a finite number
trainer.limit_train_batches=nan         | trainer.limit_train_batches: expected a finite number
trainer.gradient_clip_val=inf           | trainer.gradient_clip_val: expected a finite number
training=probing training.l2=[nan]      | training.l2[0]: expected a finite number
training=probing training.l2=0.01       | training.l2: expected a list of (a number), not 0.01
training=tracing                        | training.corrupted has no value
training=lora data=responses ~training.targets | training.targets has no value
data.seed=3                             | data.seed: the run's seed is used; set seed=<n>
data.task=x                             | data.task: choose it with task=<choice>
data.network=x                          | data.network: the run gives its base model
network.model=x                         | network.model: the run gives its base model
network.trainable=true                  | network.trainable: the training decides it
training.network=x                      | training.network: the run gives its base model
training.sites=[layer1.block_output]    | training.sites: set site=<site>
training.intervention=x                 | training.intervention: choose it with intervention=<choice>
training.hidden_sizes=[3]               | training.hidden_sizes: they are read from the model
training=probing training.classes={a:2} | training.classes: they are counted
training.optimizer.params=[1]           | training.optimizer.params: the run gives it to Adam
intervention.hidden_size=5              | intervention.hidden_size: the run gives it to DAS
trainer.logger=false                    | trainer.logger: choose it with logger=<choice>
trainer.default_root_dir=x              | trainer.default_root_dir: set output=<folder>
trainer.overfit_batches=1               | use trainer.limit_train_batches=<n>
trainer.fast_dev_run=true               | trainer.fast_dev_run: it drops loggers and checkpoints
trainer.barebones=true                  | trainer.barebones: it forbids the figures
trainer.limit_predict_batches=1         | trainer.limit_predict_batches: no verb predicts
trainer.model_registry=x                | trainer.model_registry: no verb uploads models
trainer.use_distributed_sampler=false   | trainer.use_distributed_sampler: splits are divided
trainer.callbacks=early_stopping        | trainer.callbacks: expected a mapping with _target_
trainer.callbacks=[3]                   | trainer.callbacks[0]: expected a mapping with _target_
trainer.callbacks={a:3}                 | trainer.callbacks.a: expected a mapping with _target_
trainer.callbacks.a._target_=STOPPING   | trainer.callbacks.a.monitor has no value
trainer.callbacks.a._target_=DAS        | trainer.callbacks.a._target_: DAS makes no Callback
trainer.precision=17                    | trainer.precision: expected
trainer.plugins=nope                    | trainer.plugins: expected
training=probing intervention.rank=2    | 'intervention.rank=2' has no effect: ProbeTraining takes no intervention
training=lora site=layer1.block_output@last | has no effect: LoRAFinetuning takes no site
intervention=full_vector intervention.rank=3 | intervention.rank: FullVector takes no 'rank'
intervention._partial_=false            | intervention._partial_: leave it out
model._partial_=true                    | model._partial_: leave it out
model._args_=[1]                        | model._args_: load_embedded takes its arguments by name
training._args_=[1]                     | training._args_: AlignmentSearch takes its arguments by name
training.optimizer._partial_=false      | training.optimizer: add training.optimizer._partial_=true
training.optimizer._target_=DAS         | training.optimizer._target_: DAS makes no Optimizer
intervention=mask intervention.gate._target_=DAS | intervention.gate: add intervention.gate._partial_=true
intervention._target_=itrain.tasks.gender.Gender | intervention._target_: Gender makes no Intervention
intervention._target_=itrain.interventions.base.Intervention | Intervention is abstract
task._target_=itrain.tasks.base.Task    | task._target_: Task is abstract; name a class derived from it
task._target_=pathlib.Path              | task._target_: Path makes no Task
task._target_=DAS                       | task._target_: DAS makes no Task
data._target_=DAS                       | data._target_: DAS makes no SplitDataModule
training._target_=DAS                   | training._target_: DAS makes no Training
network._target_=DAS                    | network._target_: DAS makes no Network
logger._target_=DAS                     | logger._target_: DAS makes no Logger
trainer._target_=DAS                    | trainer._target_: DAS makes no Trainer
logger.offline=true                     | logger: needs _target_
"""

# Refused when the part is built or used: `itrain fit` with these words.
FAILED = """
threads=0                               | threads=0: give 1 to
threads=1000000                         | threads=1000000: give 1 to
intervention.rank=0                     | intervention.rank 0 does not fit an activation of 80 features
intervention.rank=-1                    | intervention.rank -1 does not fit
intervention.rank=1000                  | intervention.rank 1000 does not fit
intervention=fixed_blocks intervention.blocks={} | intervention.blocks is empty
intervention=boundless_das intervention.boundary_lr=-1 | intervention.boundary_lr=-1: give 0 or more
intervention=boundless_das intervention.boundary_weight=-1 | intervention.boundary_weight=-1: give 0 or more
intervention=boundless_das intervention.temperature=[0,1] | intervention: temperatures must be above 0
intervention=mask intervention.sparsity=-1 | intervention.sparsity=-1: give 0 or more
intervention=linear_discriminant intervention.shrinkage=-1 | intervention.shrinkage is a share of the mean variance
training.isolate_weight=-1              | training.isolate_weight=-1: give 0 or more
training.warmup=-1                      | warmup is a share of all steps
training.optimizer.lr=-1                | training.optimizer: Adam fails with ValueError: Invalid learning rate
training.optimizer=null                 | training needs an optimizer
training.optimizer.lr=0                 | a learning rate of 0 trains nothing; set training.optimizer.lr=<rate>
training=probing training.l2=[]         | training.l2 is one strength or several
training=probing training.l2=[-1]       | training.l2 is one strength or several
training=tracing training.corrupted=x intervention=full_vector | site 'x': expected layer<N>
training=tracing training.corrupted=layer0.block_input@name training.noise=-1 | training.noise=-1: give 0 or more
data.train_pairs=0                      | data.train_pairs
data.batch_size=0                       | data.batch_size=0: give 1 or more
data.eval_batch_size=0                  | data.eval_batch_size=0: give 1 or more
data.num_workers=-1                     | data.num_workers=-1: give 0 or more
network.budget_gib=-1                   | network.budget_gib=-1: give 0 or more
network.uses=0                          | network.uses=0: give 1 or more
task.changing=2                         | task.changing=2: give a share, from 0 to 1
task.verbs=[]                           | task.verbs is empty
task.male_names=[]                      | task.male_names is empty
task.templates=nope                     | task.templates: 'nope' is none of
task=entity_attributes task.attributes=[] | task.attributes is empty
task=entity_attributes task.isolating=-1 | task.isolating=-1: give a share
task=price_tagging task.changing=-1     | task.changing=-1: give a share
model=hierarchical_equality_mlp model.hidden_size=0 | model.hidden_size=0: give 1 or more
model=hierarchical_equality_mlp model.steps=-1 | model.steps=-1: give 1 or more
model=pvr_cnn model.block_size=0        | model.block_size=0: give 1 or more
model=pvr_cnn                           | Gender is a task in text, but the base model has no tokenizer
model=hf model.name=/nowhere/at/all     | there is no such folder
model._target_=HERE.no_model            | model: HERE.no_model makes a NoneType
task._target_=HERE.Raises               | task: Raises fails with KeyError: 'mine'
intervention._target_=HERE.Explodes     | intervention: Explodes fails with ZeroDivisionError: boom
site=layer99.block_output@name          | layer 99 does not exist
site=layer2.nothing@name                | has no component 'nothing'
site=layer2.block_output@nope           | names no span 'nope'
trainer.max_epochs=0                    | trainer.max_epochs=0 trains nothing
trainer.max_steps=0                     | trainer.max_steps=0 trains nothing
trainer.max_epochs=-5                   | `max_epochs` must be
trainer.max_time={hours:-1}             | no step was taken
trainer.limit_train_batches=0           | trainer.limit_train_batches=0 trains nothing
trainer.limit_test_batches=0            | trainer.limit_test_batches=0 tests nothing
trainer.gradient_clip_val=-1            | trainer.gradient_clip_val=-1: give 0 or more
trainer.accumulate_grad_batches=0       | trainer.accumulate_grad_batches=0: give 1 or more
trainer.check_val_every_n_epoch=0       | trainer.check_val_every_n_epoch=0: give 1 or more
trainer.log_every_n_steps=-1            | trainer.log_every_n_steps=-1: give 0 or more
trainer.num_sanity_val_steps=-5         | trainer.num_sanity_val_steps=-5: give -1 or more
trainer.val_check_interval=0            | trainer.val_check_interval=0: give a number of steps
trainer.val_check_interval=1000         | `val_check_interval` (1000) must be less than or equal
trainer.limit_test_batches=0.0001       | trainer.limit_test_batches=0.0001 of the test batches is none
trainer.devices=-3                      | trainer: Trainer fails with TypeError: `devices`
trainer.strategy=nope                   | trainer: You selected an invalid strategy name
trainer.callbacks.a={_target_:STOPPING,monitor:validation/iia_argmax,mode:up} | trainer.callbacks.a: `mode` can be
"""

# Other verbs.
OTHERS = """
list nope                               | there is no part 'nope'
list data model                         | 'list' takes one group
test                                    | 'test' needs ckpt=<run folder or .ckpt> or export=<folder>
export                                  | 'export' needs ckpt=<run folder or .ckpt>
generate prompt=x                       | generate needs export=<folder>
sweep resume=nowhere                    | there is no config.yaml in 'nowhere'
sweep resume=                           | resume is empty; add resume=<the folder of a sweep>
sweep site=layer1.block_output@name     | a sweep takes no site; set sweep.layers and sweep.positions
sweep intervention.rank=2               | a sweep takes no intervention; set sweep.methods and sweep.ranks
sweep training=lora                     | training: a sweep compares interventions, and LoRAFinetuning takes none
sweep sweep.words=[a]                   | sweep.words: a run writes it down itself
sweep sweep.methods=3                   | sweep.methods: expected names in brackets
sweep sweep.methods=[das,das]           | sweep.methods: das is listed twice
sweep sweep.methods=[nope]              | there is no method 'nope'
sweep sweep.methods={a:3}               | sweep.methods
sweep sweep.methods={a:{_target_:DAS,rank:3}} | sweep.methods.a.rank: set sweep.ranks=[<n>]
sweep sweep.methods={a:{_target_:pathlib.Path}} | sweep.methods.a: Path is neither an intervention nor a training
sweep sweep.ranks=[nan]                 | sweep.ranks[0]: expected a finite number
sweep trainer=early_stopping            | trainer.callbacks: the fits of a sweep have none
sweep trainer.devices=2                 | trainer.devices: launcher=devices deals the jobs
sweep trainer.strategy=deepspeed        | trainer.strategy: launcher=devices deals the jobs
sweep trainer=ddp_cpu launcher=devices  | launcher: with trainer.strategy=ddp each job runs on all devices
sweep trainer.enable_checkpointing=true | trainer.enable_checkpointing: a sweep keeps figures
sweep trainer.enable_model_summary=true | trainer.enable_model_summary: a sweep trains several
sweep trainer.log_every_n_steps=7       | trainer.log_every_n_steps: a sweep keeps the figures of epochs
sweep launcher.n_jobs=2                 | launcher: needs _target_
"""

SWEPT = """
sweep sweep.layers=every(0)             | sweep.layers: 'every(0)' is none of all, every(2)
sweep sweep.layers=[]                   | sweep.layers is empty
sweep sweep.ranks=[0]                   | sweep.ranks=0: give 1 or more
sweep sweep.seeds=[-1]                  | sweep.seeds=-1: give 0 or more
sweep sweep.seeds=[9999999999]          | sweep.seeds: expected 0 to 4294967295
sweep sweep.positions=nope              | sweep.positions: 'nope' is neither all nor a list
sweep sweep.methods=[das] sweep.components=[nope] sweep.positions=[name] | has no component 'nope'
sweep sweep.patience=0                  | sweep.patience=0: give 1 or more
"""


def table(text: str, *before: str) -> list[tuple[list[str], str]]:
    rows = []
    for line in text.strip().splitlines():
        for short, long in (("HERE", HERE), ("_target_:DAS", f"_target_:{DAS}"), ("_target_=DAS", f"_target_={DAS}")):
            line = line.replace(short, long)
        words, message = line.replace("STOPPING", STOPPING).split(" | ", 1)
        rows.append(([*before, *shlex.split(words, posix=False)], message.strip()))
    return rows


REFUSED = [*table(CHECKED, "show"), *table(OTHERS)]
BROKEN = [*table(FAILED, "fit", *SMALL), *table(SWEPT)]


@pytest.fixture(scope="module")
def model() -> functools._lru_cache_wrapper[models.BaseModel]:
    return functools.cache(models.load_embedded)


@pytest.fixture(autouse=True)
def elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: functools._lru_cache_wrapper[models.BaseModel]
) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_embedded", model)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_there_are_many() -> None:
    assert len(REFUSED) + len(BROKEN) >= 180


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [*((*row, 2) for row in REFUSED), *((*row, 1) for row in BROKEN)],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(
    words: list[str],
    message: str,
    code: int,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert cli.main(words) == code
    assert not caplog.records
    said = capsys.readouterr().err
    assert said.startswith("itrain: ") and said.count("\n") == 1, said
    assert message in said
    assert list(elsewhere.iterdir()) == []


def test_debug_shows_the_traceback_of_a_users_own_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InstantiationException) as caught:
        cli.main(["fit", *SMALL, f"task._target_={HERE}.Raises", "--debug"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_one_bad_file_among_the_recipes_is_named_and_hides_no_other(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes" / "latin.yaml").write_bytes("# Größe\nseed: 1\n".encode("latin-1"))
    (elsewhere / "recipes" / "folder.yaml").mkdir()
    (elsewhere / "recipes" / "gone.yaml").symlink_to("nowhere.yaml")
    (elsewhere / "recipes" / "good.yaml").write_text("# A good one.\nseed: 1\n")
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert "A good one." in said and "das_gender" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("! ")] == ["folder", "gone", "latin"]
    assert cli.main(["show", "recipe=good"]) == 0
    for name in ("latin", "folder", "gone"):
        assert cli.main(["show", f"recipe={name}"]) == 2
        assert f"{name}.yaml" in capsys.readouterr().err


DAMAGED = {
    "cyclic": "a: &x [*x]\n",
    "deep": "a: " + "[" * 3000 + "]" * 3000,
    "long": f"seed: {'1' * 5000}\n",
    "choices": "defaults: 3\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_recipe_that_cannot_be_read_is_named_and_hides_no_other(
    name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes" / f"{name}.yaml").write_text(DAMAGED[name])
    assert cli.main(["list"]) == cli.main(["show", "recipe=das_gender"]) == 0
    capsys.readouterr()
    assert cli.main(["show", f"recipe={name}"]) == 2
    said = capsys.readouterr().err
    assert f"{name}.yaml" in said and said.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_knows_few_characters_is_enough(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(["show", "name='Größe→'"]) == 0
    assert cli.main(["fit", *SMALL]) == 0
    assert cli.main(["show", "recipe=Größe→"]) == 2
    out.flush()
    assert b"name: " in out.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "kept", "gone"),
    [
        (["recipe=das_price", "intervention=full_vector"], "task.variable", "intervention.rank"),
        (["recipe=das_price", "task=gender"], "intervention.rank", "task.variable"),
        (["recipe=das_price", "trainer=cpu"], "trainer.max_epochs", "trainer.nothing"),
        (["recipe=trace_landmarks", "training=alignment", "~training.corrupted"], "task.splits", "training.corrupted"),
        (["recipe=boundless_das_price", "intervention=null", "training=probing"], "task", "intervention.temperature"),
    ],
)
def test_settings_of_a_recipe_do_not_outlive_the_class_they_belong_to(words: list[str], kept: str, gone: str) -> None:
    from omegaconf import OmegaConf

    from itrain.config import check, compose

    composed = compose(words)
    check(composed)
    assert OmegaConf.select(composed, kept) is not None
    assert OmegaConf.select(composed, gone) is None


def test_a_run_of_an_own_class_bears_its_name() -> None:
    from itrain.config import compose

    assert compose([f"task._target_={HERE}.Raises"]).name == "das_Raises"
    assert compose([f"intervention._target_={HERE}.Explodes"]).name == "Explodes_gender"
    assert compose([]).name == "das_gender"
