"""What a stranger reads in a tracker: each number once and by one name, axes, captions, and one run for one fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from itrain.config import request
from itrain.loggers.runs import Identity, compared, identify_run, legible
from itrain.loggers.wandb import Wandb
from itrain.signatures import ConfigError
from itrain.trainers import make_logger
from tests.test_loggers import read_run


def test_counts_are_told_once() -> None:
    """Each epoch has the same pairs, and each control has those of the test."""
    logged = {
        "validation/iia_argmax": 0.5,
        "validation/pairs_changing": 16.0,
        "test/pairs_changing": 32.0,
        "test/gender/pairs_changing": 30.0,
        "test/full_vector/pairs_changing": 32.0,
        "test/full_vector/logit_difference_clean": 8.0,
        "test/logit_difference_clean": 8.0,
        "random_model/logit_difference_clean": 0.1,
    }
    left = {"validation/pairs_changing", "test/full_vector/pairs_changing", "test/full_vector/logit_difference_clean"}
    assert set(legible(logged)) == {*logged} - left


@pytest.mark.parametrize("site", ["layer2.block_output@name", "module:cell.output.step0"])
def test_a_probe_alone_has_the_names_of_one_in_a_sweep(site: str) -> None:
    alone = {"test/probe_accuracy": 0.9, f"test/probe_accuracy/gender {site}": 0.9, f"test/l2/gender {site}": 0.1}
    assert legible(alone) == {"test/probe_accuracy": 0.9, "test/l2": 0.1}


def test_several_places_and_names_of_a_user_keep_their_figures_apart() -> None:
    several = {"test/l2/gender layer1.block_output@a": 0.1, "test/l2/gender layer2.block_output@a": 0.2}
    assert legible(several) == {"test/l2/gender 1@a": 0.1, "test/l2/gender 2@a": 0.2}
    own = {"train/my loss": 0.3, "my loss": 0.4}
    assert legible(own) == own


@pytest.mark.parametrize(
    ("figures", "above"),
    [
        ({"test/iia_changing_argmax": 0.75}, 0.75),
        ({"test/probe_accuracy": 0.75, "test/majority_accuracy": 0.5}, 0.5),
        ({"test/probe_accuracy": 0.25, "test/majority_accuracy": 0.5}, -0.5),
    ],
)
def test_interventions_and_probes_share_a_figure_that_is_0_at_chance(figures: dict[str, float], above: float) -> None:
    assert compared(figures) == {"test/above_chance": pytest.approx(above)}


@pytest.mark.parametrize(
    "figures",
    [
        {"test/probe_accuracy": 0.75},
        {"test/probe_accuracy": 1.0, "test/majority_accuracy": 1.0},
        {"test/exact_match": 0.5},
    ],
)
def test_a_figure_whose_chance_is_not_known_is_not_compared(figures: dict[str, float]) -> None:
    assert compared(figures) == {}


@pytest.mark.parametrize(
    "site", ["layer2.block_output@name", {"layer": 2, "component": "block_output", "position": "name"}]
)
def test_a_site_is_configured_alike_however_it_was_written(site: object) -> None:
    config = identify_run({"site": site}).config
    assert config["site"] == {"layer": 2, "component": "block_output", "position": "name"} and config["window"] == 1


def test_a_test_of_saved_weights_is_told_from_its_fit_by_name() -> None:
    configuration = {"intervention": {"_target_": "a.DAS", "rank": 1}, "site": "layer2.block_output@name", "seed": 0}
    assert identify_run(configuration, "test").name == "das 2@name r1 s0 test"


@pytest.mark.parametrize("place", ["checkpoints/last.ckpt", "requeued.ckpt"])
def test_a_fit_that_goes_on_is_one_run_whose_curve_is_over_epochs(place: str, tmp_path: Path) -> None:
    for name in ("run-20260101_000000-old", "offline-run-20260102_000000-abc"):
        (tmp_path / "first" / "wandb" / name).mkdir(parents=True)
    identity = identify_run({"ckpt": str(tmp_path / "first" / place)})
    logger = Wandb(project="itrain", offline=True, save_dir=str(tmp_path))
    logger.identify(identity)
    logger.log_metrics({"train/loss": 0.5, "epoch": 3}, step=30)
    logger.log_metrics({"validation/iia_argmax": 1.0, "epoch": 3}, step=30)
    logger.experiment.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    run = read_run(file)
    assert run["run_id"] == "abc" == logger.version
    assert run["axes"] == {"*": "trainer/global_step", "validation/iia_argmax": "epoch"}


@pytest.mark.parametrize("former", [None, "elsewhere/checkpoints/last.ckpt"])
def test_a_fit_of_its_own_and_one_that_logged_nothing_begin_a_run(former: str | None, tmp_path: Path) -> None:
    identity = Identity(
        name="a", group="b", job_type="fit", tags=(), config={}, former=(former and tmp_path / former) or None
    )
    logger = Wandb(project="itrain", offline=True, save_dir=str(tmp_path))
    logger.log_hyperparams = lambda *_: None  # type: ignore[method-assign, assignment]
    logger.identify(identity)
    assert logger.version is None


@pytest.mark.parametrize("name", ["TensorBoardLogger", "CSVLogger"])
def test_another_logger_of_lightning_s_needs_its_class_alone(name: str, tmp_path: Path) -> None:
    if name == "TensorBoardLogger":
        pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    config = request(["recipe=das_gender", f"logger._target_=lightning.pytorch.loggers.{name}"])
    logger = make_logger(config, tmp_path)
    assert type(logger).__name__ == name and logger.save_dir == str(tmp_path)


def test_what_no_run_fills_in_is_still_asked_of_a_logger() -> None:
    with pytest.raises(ConfigError, match=r"logger\.project has no value"):
        request(["recipe=das_gender", "logger._target_=itrain.loggers.wandb.Wandb"])


@pytest.mark.parametrize(("words", "name"), [([], "das_gender"), (["training=probing"], "probing_gender")])
def test_a_run_without_a_recipe_is_named_after_what_it_fits(words: list[str], name: str) -> None:
    """Probes and detectors take no intervention, and so are not named after that of the defaults."""
    assert request(["site=layer2.block_output@name", *words]).name == name


def test_a_class_of_training_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.Training"):
        request(["training._target_=nowhere.Training"])
