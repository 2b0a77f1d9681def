"""Every training module: processes, interruptions and exports change nothing, and a process that fails ends the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from itrain.cli import main
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.finetuning import RepresentationFinetuning
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.judgements import read_judgements
from itrain.training.monitoring import Monitoring
from itrain.training.probing import ProbeTraining
from tests.commands import only_run

ROOT = Path(__file__).parents[1]
STEPS = ["trainer.max_epochs=4", "data.batch_size=16", "trainer.enable_progress_bar=false"]
PAIRS = ["data.train_pairs=77", "data.validation_pairs=33", "data.test_pairs=61", "data.eval_batch_size=32"]
EXAMPLES = ["data.train_examples=77", "data.validation_examples=33", "data.test_examples=41", "data.eval_batch_size=32"]
TEXTS = ["data.train_texts=77", "data.validation_texts=65", "data.test_texts=61", "data.eval_batch_size=32"]
"""20 steps; the last batch of each epoch has 13 examples, which two processes cannot divide evenly."""

PAIR_COUNTS = ("test/pairs_changing", "test/pairs_preserving")

# At the recipe's rate, ten times this, rounding grows to 5e-5 in 20 steps.
SMALL_STEPS = ["training.optimizer.lr=0.01"]
# Adam would turn what is rounding alone, the gradient of a key's bias for example, into whole steps.
DESCENT = ["training.optimizer._target_=torch.optim.SGD", "training.optimizer.lr=0.03"]

TRAININGS: dict[type[Training], list[str]] = {
    AlignmentSearch: ["recipe=das_gender", *PAIRS],
    ProbeTraining: ["recipe=probe_gender", *PAIRS],
    Monitoring: ["recipe=monitor_gender", *TEXTS],
    RepresentationFinetuning: ["recipe=reft_style", *EXAMPLES, *SMALL_STEPS],
    InterchangeInterventionTraining: ["recipe=das_gender", "training=iit", *PAIRS, *DESCENT],
}
READ = "{write:layer2.block_output@name,read:layer1.block_output@name}"
OWN = "{site:layer3.block_output@last,intervention:{_target_:itrain.interventions.das.DAS,rank:2}}"
EQUALITY = ["recipe=das_hierarchical_equality", "model.steps=300", "data.keep=all", *PAIRS]
# Of 4 pairs each; one that is left over would be left out in two processes.
FEW = ["data.train_pairs=78", "data.batch_size=4"]
FORMS: dict[str, list[str]] = {
    "placements": ["recipe=das_gender", f"site=[{READ},{OWN}]", *PAIRS],
    # Of four pairs, two processes seldom both have one for each site.
    "a site of each variable": [
        *[*EQUALITY, *FEW, "intervention=das", "intervention.rank=4"],
        "site={left:module:hidden1.output,right:module:hidden2.output}",
    ],
    "intervened sources": ["recipe=das_gender", "task._target_=tests.chained.ChainedGender", *PAIRS],
    "every token": ["recipe=reft_style", "training.acts=all", *EXAMPLES, *SMALL_STEPS],
    "sampled text": [
        *["recipe=steer_story", "training.strengths=[0.5,1]", "training.max_new_tokens=6", *EXAMPLES],
        "training.optimizer.lr=0.05",
    ],
    "several attributes": ["recipe=mdas_entity", "task.attributes=[color,material]", *PAIRS, *SMALL_STEPS],
    "judged text": [
        *["recipe=steer_story", "training.strengths=[0.1,0.2]", "training.max_new_tokens=6", *EXAMPLES],
        *["training.optimizer.lr=0.05", "training.scale=max_activation"],
        "training.judge={_target_: itrain.training.judges.WordJudge}",
    ],
    "probes under an erasure": ["recipe=amnesic_probe_gender", *PAIRS],
}
"""The same in other forms."""


def each_training(*, quick: Collection[type[Training]] = tuple(TRAININGS)) -> pytest.MarkDecorator:
    """A test for every training; slow for all but the quick ones."""
    cases = [
        pytest.param(each, marks=[] if each in quick else [pytest.mark.slow], id=each.__name__) for each in TRAININGS
    ]
    return pytest.mark.parametrize("training", cases)


class FailingDescent(torch.optim.SGD):
    """Fails at its third step in one process of two."""

    steps = 0

    def step(self, *arguments: object, **settings: object) -> None:
        type(self).steps += 1
        if self.steps == 3 and os.environ.get("LOCAL_RANK", "0") == os.environ["FAILING_RANK"]:
            Path(os.environ["FAILED"]).touch()
            raise RuntimeError("this process fails")
        super().step(*arguments, **settings)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole_runs() -> dict[type[Training], Path]:
    return {}


@pytest.fixture
def whole(
    training: type[Training], whole_runs: dict[type[Training], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of one process from beginning to end."""
    if training not in whole_runs:
        folder = tmp_path_factory.mktemp(training.__name__)
        assert main(["fit", *TRAININGS[training], *STEPS, "trainer=cpu", f"output={folder}"]) == 0
        whole_runs[training] = only_run(folder)
    return whole_runs[training]


def in_two_processes(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "itrain", "fit", *STEPS, "trainer=ddp_cpu", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def figures(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def weights(run: Path) -> dict[str, Tensor]:
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: weight for name, weight in saved.items() if weight.is_floating_point()}


@each_training(quick=[AlignmentSearch, ProbeTraining])
def test_two_processes_learn_what_one_does(training: type[Training], whole: Path) -> None:
    done = in_two_processes(*TRAININGS[training], "output=two")
    assert done.returncode == 0, done.stderr
    two = only_run(Path("two"))
    assert figures(two) == pytest.approx(figures(whole), rel=1e-5, abs=1e-6)
    for folder in (two, whole):
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20
    exports = [load_file(folder / "export" / "intervention.safetensors") for folder in (two, whole)]
    for found, expected in ((weights(two), weights(whole)), exports):
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            # Flags among them have no difference of their own kind.
            assert (found[name].double() - weight.double()).norm() <= 1e-6 * weight.double().norm(), name
    if training is AlignmentSearch:
        assert sum(value for name, value in figures(two).items() if name in PAIR_COUNTS) == 61, "each counts once"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_learn_and_measure_what_one_does_in_every_form(form: str) -> None:
    assert main(["fit", *STEPS, *FORMS[form], "trainer=cpu", "output=one"]) == 0
    done = in_two_processes(*FORMS[form], "output=two")
    assert done.returncode == 0, done.stderr
    one, two = (only_run(Path(folder)) for folder in ("one", "two"))
    assert figures(two) == pytest.approx(figures(one), rel=1e-5, abs=1e-6)
    for name, weight in weights(one).items():
        assert (weights(two)[name] - weight).double().norm() <= 1e-6 * weight.double().norm(), name
    if (one / "judgements.jsonl").exists():
        judged = [read_judgements(folder / "judgements.jsonl") for folder in (one, two)]
        said = [[(each.place, each.continuation.text, each.verdict) for each in listed] for listed in judged]
        assert said[0] == said[1] and len(said[0]) == 3 * (33 + 41) + 2 * 41
    for place in (f"export={one / 'export'}", f"ckpt={one}"):
        again = Path(place.partition("=")[0]).resolve()
        assert main(["test", place, "trust=[tests]", f"output={again}"]) == 0
        reported = {name: value for name, value in figures(one).items() if not name.startswith("before/")}
        assert figures(only_run(again)) == pytest.approx(reported, rel=1e-5)


@each_training()
def test_an_interrupted_run_resumes_to_the_same_weights(
    training: type[Training], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(module: Training, batch: object, batch_idx: int) -> None:
        if module.current_epoch == 2 and batch_idx == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "on_train_batch_start", stop)
        assert main(["fit", *TRAININGS[training], *STEPS, "trainer=cpu", "output=stopped"]) == 130
    assert main(["fit", f"ckpt={only_run(Path('stopped'))}", "output=resumed"]) == 0
    resumed = only_run(Path("resumed"))
    assert figures(resumed) == figures(whole)
    found = weights(resumed)
    assert all(torch.equal(found[name], weight) for name, weight in weights(whole).items())


@each_training()
def test_an_export_gives_the_reported_figures(training: type[Training], whole: Path) -> None:
    """Orthonormal rows come back to rounding, so a perplexity may differ by that."""
    assert main(["test", f"export={whole / 'export'}", "output=again"]) == 0
    reported = {name: value for name, value in figures(whole).items() if not name.startswith("before/")}
    assert figures(only_run(Path("again"))) == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
@each_training(quick=[AlignmentSearch])
def test_a_process_that_fails_ends_the_run(training: type[Training], rank: str) -> None:
    failing = "training.optimizer._target_=tests.test_processes.FailingDescent"
    failed = Path("failed").resolve()
    done = in_two_processes(*TRAININGS[training], failing, "output=run", FAILING_RANK=rank, FAILED=str(failed))
    assert done.returncode != 0
    assert time.time() - failed.stat().st_mtime < 60
    assert "this process fails" in done.stdout + done.stderr
