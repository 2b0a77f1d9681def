"""Advice: what a message tells the user to do works as printed, and points to the right place."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import itrain
from itrain import cli
from itrain.config import check, compose
from itrain.signatures import ConfigError
from itrain.tasks import TaskError
from itrain.trust import TrustError, find

SITE = "layer2.block_output@name"
OWN = """
import os, signal, lightning, pathlib
from itrain import Gender

class Mine(Gender):
    pass

class StopOnce(lightning.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not pathlib.Path("stopped").exists():
            pathlib.Path("stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
"""
SMALL = ("data.train_pairs=32", "data.validation_pairs=8", "data.test_pairs=8", "trainer.max_epochs=2")


def test_the_command_that_goes_on_trusts_the_classes_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_of_advice.py").write_text(OWN)
    own = ("task._target_=own_of_advice.Mine", "+trainer.callbacks.stop._target_=own_of_advice.StopOnce")
    assert cli.main(["fit", "recipe=das_gender", *own, *SMALL]) == 143
    told = capsys.readouterr().err
    command = re.search(r"to go on: itrain (.*)", told)
    assert command and command[1].endswith(" trust=[own_of_advice]"), told
    assert cli.main(shlex.split(command[1])) == 0
    told = capsys.readouterr().out
    assert "distinct test pairs: 8" in told
    following = re.search(r"itrain (test export=\S+ seed=1 trust=\[own_of_advice\])  #", told)
    assert following, told
    assert cli.main(shlex.split(following[1])) == 0


def test_a_function_that_does_not_say_what_it_makes_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "unsaid.py").write_text(
        "import itrain\n"
        "def trained():\n    return itrain.load_embedded()\n"
        "def said() -> itrain.BaseModel:\n    return trained()\n"
        "def called_back():\n    return None\n"
    )
    configuration = compose(["recipe=das_gender", "model._target_=unsaid.said"])
    check(configuration)
    for key, made, role in (
        ("model", "trained", "model"),
        ("+trainer.callbacks.mine", "called_back", "part of the trainer"),
    ):
        told = rf"\._target_ names unsaid\.{made}, which is no {role}; annotate what the function returns: -> "
        with pytest.raises(ConfigError, match=told):
            check(compose(["recipe=das_gender", f"{key}._target_=unsaid.{made}"]))


def test_a_network_is_made_of_a_module_and_a_training_of_a_network() -> None:
    base = itrain.load_embedded()
    given: Any = base
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, not of BaseModel; give its \.model"):
        itrain.make_network(given)
    bare: Any = base.model
    with pytest.raises(TypeError, match=r"GPTNeoXForCausalLM is none; make one: itrain\.make_network\(model\)"):
        itrain.AlignmentSearch(network=bare, sites=SITE, intervention=itrain.DAS)


def test_an_optimizer_that_is_built_already_is_refused_before_the_fit() -> None:
    base = itrain.load_embedded()
    network = itrain.make_network(base.model)
    built: Any = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match=r"give what builds it: optimizer=partial\(torch\.optim\.Adam, lr=1e-2\)"):
        itrain.AlignmentSearch(network=network, sites=SITE, intervention=partial(itrain.DAS, rank=1), optimizer=built)


def test_a_module_of_unknown_size_is_told_by_an_example() -> None:
    network = itrain.make_network(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    inputs = itrain.ModelInputs(arguments={"input": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"hidden_sizes=itrain\.count_features\(network, sites, data\.example\(\)\)"):
        itrain.AlignmentSearch(network=network, sites="module:1.output", intervention=itrain.DAS)
    sizes = itrain.count_features(network, "module:1.output", inputs)
    search = itrain.AlignmentSearch(
        network=network, sites="module:1.output", intervention=itrain.DAS, hidden_sizes=sizes
    )
    assert search.interchange.hidden_sizes == [5]


def test_an_unknown_word_of_the_prompt_is_not_blamed_on_the_answer() -> None:
    task = itrain.Gender(templates=["{name} zzz {connective}"])
    task.bind(itrain.load_embedded().tokenizer)
    with pytest.raises(TaskError, match=r"the prompt '.*' has 'zzz', which is not in the model's vocabulary"):
        task.label("he")


def test_a_class_that_cannot_be_imported_says_where_to_run() -> None:
    with pytest.raises(TrustError, match=r"cannot be imported here \(No module named 'absent'\); install its package"):
        find("absent.Mine", (itrain.Task,), role="task", trust=["absent"], place="a file")
