"""Sharded runs: shards learn what one process does, and nobody can tell their files from those of one process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from itrain.cli import main
from itrain.networks.base import Network
from tests.sharded import (
    DESCENT,
    EXAMPLES,
    LOSSES,
    PAIRS,
    STEPS,
    figures,
    fit,
    in_processes,
    moments,
    only_run,
    require_alike,
    state,
)

RUNS: dict[str, list[str]] = {
    "das_gender": ["recipe=das_gender", *PAIRS],
    "boundless_das_price": ["recipe=boundless_das_price", *PAIRS, *DESCENT],
    "iit_lora_gender": ["recipe=iit_lora_gender", *PAIRS, *DESCENT],
    "iit": ["recipe=das_gender", "training=iit", *PAIRS, *DESCENT],
    "iit of parts": ["recipe=das_gender", "training=iit", "training.parts=[*.mlp]", *PAIRS, *DESCENT],
    "iit of a plain module": ["recipe=iit_hierarchical_equality", *PAIRS, *DESCENT],
    "reft_style": ["recipe=reft_style", *EXAMPLES, "training.optimizer.lr=0.01"],
    "probe_gender": ["recipe=probe_gender", *PAIRS],
    "lora_style": ["recipe=lora_style", *EXAMPLES, *DESCENT],
    "clipped and accumulated": [
        *["recipe=das_gender", "training=iit", *PAIRS, *DESCENT],
        *["trainer.gradient_clip_val=0.1", "trainer.accumulate_grad_batches=2"],
    ],
    "sampled text": [
        *["recipe=steer_story", "training.strengths=[0.5,1]", "training.max_new_tokens=6", *EXAMPLES],
        "training.optimizer.lr=0.05",
    ],
    "intervened sources": ["recipe=das_gender", "task._target_=tests.chained.ChainedGender", *PAIRS],
    # Of four pairs, two processes seldom both have one for each site, and would make different runs.
    "a site of each variable": [
        *["recipe=das_hierarchical_equality", "model.steps=300", "data.keep=all", *PAIRS, "data.train_pairs=78"],
        *["data.batch_size=4", "intervention=das", "intervention.rank=4", *DESCENT],
        "site={left:module:hidden1.output,right:module:hidden2.output}",
    ],
    "pairs of which some weigh nothing": [
        *["recipe=iit_hierarchical_equality", *PAIRS, "data.train_pairs=78", "data.batch_size=4", *DESCENT],
        *["training.source_weight=0.5", "training.interchange_weights={left: 1.0}"],
    ],
}
QUICK = ("das_gender",)
each_run = pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in QUICK else [pytest.mark.slow]) for each in RUNS]
)
TRAINER = {"one": "trainer=cpu", "sharded": "trainer=fsdp_cpu", "ddp": "trainer=ddp_cpu"}
# With a plain Adam, gradients that are rounding alone become whole steps.
ADAM = ["training.optimizer._target_=torch.optim.Adam", "training.optimizer.lr=1e-3", "+training.optimizer.eps=1e-2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@each_run
def test_shards_learn_and_measure_what_one_process_does(name: str) -> None:
    words = [*STEPS, *RUNS[name]]
    assert main(["fit", *words, "trainer=cpu", "output=one"]) == 0
    one, two = only_run(Path("one")), fit("two", *words, "trainer=fsdp_cpu")
    losses = [json.loads((run / "losses.json").read_text()) for run in (two, one)]
    assert len(losses[0]) == len(losses[1]) >= 20
    # Later ones differ by the rounding of all the steps before.
    assert losses[0][:20] == pytest.approx(losses[1][:20], rel=1e-5, abs=1e-7)
    require_alike(state(two), state(one))
    assert figures(two) == pytest.approx(figures(one), rel=1e-5, abs=1e-6)
    exports = [run / "export" for run in (two, one)]
    require_alike(*(load_file(folder / "intervention.safetensors") for folder in exports))
    described = [json.loads((folder / "intervention_config.json").read_text()) for folder in exports]
    assert described[0]["base_model"] == described[1]["base_model"]
    assert main(["test", f"export={two / 'export'}", "trust=[tests]", "trainer=cpu", "output=again"]) == 0
    reported = {key: value for key, value in figures(two).items() if not key.startswith("before/")}
    assert figures(only_run(Path("again"))) == pytest.approx(reported, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["das", "iit"])
@pytest.mark.parametrize(("before", "after"), [("sharded", "one"), ("one", "sharded"), ("ddp", "sharded")])
def test_a_run_is_resumed_by_other_processes_with_its_moments(before: str, after: str, training: str) -> None:
    words = ["recipe=das_gender", *PAIRS, "data.batch_size=16", "trainer.enable_progress_bar=false", *LOSSES]
    words += ["training=iit", *ADAM] if training == "iit" else []
    # The same schedule in both parts, of which the first ends early.
    begun = fit("begun", *words, "trainer.max_epochs=4", "trainer.max_steps=10", TRAINER[before])
    resumed = fit("resumed", f"ckpt={begun}", "trainer.max_steps=20", "trust=[tests]", TRAINER[after])
    whole = fit("first", *words, "trainer.max_epochs=4", "trainer.max_steps=10", TRAINER["one"])
    whole = fit("whole", f"ckpt={whole}", "trainer.max_steps=20", "trust=[tests]", TRAINER["one"])
    assert any(float(each.norm()) > 0 for each in moments(begun).values())
    require_alike(moments(resumed), moments(whole), rel=1e-3)
    require_alike(state(resumed), state(whole))


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_ends_a_sharded_run(rank: str) -> None:
    killed = Path("killed").resolve()
    kill = "+trainer.callbacks.killed._target_=tests.sharded.Killed"
    words = [*RUNS["das_gender"], *STEPS, kill, "trainer=fsdp_cpu", "output=run"]
    done = in_processes("fit", *words, KILLED_RANK=rank, KILLED=str(killed))
    assert done.returncode != 0
    assert time.time() - killed.stat().st_mtime < 60
    if rank == "1":
        assert "process 1 was ended by SIGKILL" in done.stderr


@pytest.mark.slow
def test_a_sharded_run_tests_and_exports_what_was_saved() -> None:
    run = fit("run", *RUNS["iit"], *STEPS, "trainer=fsdp_cpu")
    for place in (f"export={run / 'export'}", f"ckpt={run}"):
        again = Path(place.partition("=")[0]).resolve()
        done = in_processes("test", place, "trainer=fsdp_cpu", "trust=[tests]", f"output={again}")
        assert done.returncode == 0, done.stderr[-4000:]
        reported = {key: value for key, value in figures(run).items() if not key.startswith("before/")}
        assert figures(only_run(again)) == pytest.approx(reported, rel=1e-5, abs=1e-6)
    assert in_processes("export", f"ckpt={run}", "trainer=fsdp_cpu", "trust=[tests]", "output=out").returncode == 0
    (written,) = Path("out").rglob("intervention.safetensors")
    require_alike(load_file(written), load_file(run / "export" / "intervention.safetensors"))


@pytest.mark.slow
def test_processes_share_a_quantised_model_unless_it_would_be_sharded() -> None:
    pytest.importorskip("torchao")
    words = [*RUNS["das_gender"], *STEPS, "+model.quantization=int8"]
    one, two = (fit(each, *words, TRAINER[each]) for each in ("one", "ddp"))
    require_alike(state(two), state(one))
    refused = in_processes("fit", *words, TRAINER["sharded"])
    assert refused.returncode == 1 and "it is quantised" in refused.stderr and "Traceback" not in refused.stderr


def test_processes_that_could_make_different_runs_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Network, "in_step", True)
    assert main(["fit", "recipe=reft_style", "training.acts=generated", *EXAMPLES, "trainer=cpu"]) != 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("itrain:")]
    assert "act on 'all'" in line


def test_sharding_without_a_gpu_names_the_trainer_that_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "recipe=das_gender", "trainer=fsdp"]) != 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("itrain:")]
    assert "trainer=fsdp_cpu" in line
