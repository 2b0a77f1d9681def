"""A training is a plain Lightning module: Trainer.fit alone is a whole fit, and the Trainer's verbs and flags act."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import itrain
from itrain import config
from itrain.cli import main
from itrain.data import CounterfactualDataModule, SplitDataModule
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.sharing import export
from itrain.tasks import TaskError
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.callbacks import FirstStepError
from itrain.training.cohort import Cohort
from itrain.training.probing import ProbeTraining
from tests.commands import SMALL
from tests.planted import Bits
from tests.test_interchange import QUIET

SITE = "layer2.block_output@name"
ADAM = partial(torch.optim.Adam, lr=1e-2)

FITS: dict[str, list[str]] = {
    "DAS": ["recipe=das_gender"],
    "full rotation": ["recipe=das_gender", "intervention=full_rotation"],
    "Boundless DAS": ["recipe=das_gender", "intervention=boundless_das"],
    "mask": ["recipe=das_gender", "intervention=mask"],
    "hard-concrete mask": ["recipe=das_gender", "intervention=hard_concrete_mask"],
    "difference of means": ["recipe=das_gender", "intervention=mean_difference"],
    "linear discriminant": ["recipe=das_gender", "intervention=linear_discriminant"],
    "principal directions": ["recipe=das_gender", "intervention=principal_directions"],
    "mean ablation": ["recipe=das_gender", "intervention=mean"],
    "mean ablation in half precision": ["recipe=das_gender", "intervention=mean", "trainer.precision=bf16-true"],
    "LoRA in half precision": ["recipe=lora_style", "trainer.precision=bf16-true"],
    "IIT": ["recipe=das_gender", "training=iit", "intervention=fixed_blocks", "intervention.blocks={gender: 16}"],
    "IIT by LoRA": ["recipe=iit_lora_gender", "data.batch_size=16"],
    "probes": ["recipe=probe_gender"],
    "ReFT": ["recipe=reft_style"],
    "LoRA": ["recipe=lora_style"],
    "tracing": ["recipe=trace_landmarks"],
}
MEMBERS = ["DAS", "full rotation", "Boundless DAS", "mask", "hard-concrete mask", "difference of means"]
MEMBERS += ["linear discriminant", "principal directions", "mean ablation"]
CLOSED_FORM = "ignore:`LightningModule.configure_optimizers` returned `None`"
"""Lightning's word on what has nothing to optimize."""


def words_of(name: str) -> list[str]:
    responses = [word for word in SMALL if not word.startswith("data.")]
    responses += ["data.train_examples=64", "data.validation_examples=32", "data.test_examples=32"]
    return [*FITS[name], *(responses if "style" in FITS[name][0] else SMALL)]


def built(words: list[str]) -> tuple[Any, SplitDataModule, itrain.BaseModel]:
    """The module and the data of a configuration, put together by hand."""
    cfg: Any = config.compose(words)
    lightning.seed_everything(cfg.seed, verbose=False)
    training, base_model = instantiate(cfg.training, _convert_="all"), instantiate(cfg.model)
    network = make_network(base_model.model, trainable=training.func.trains_model)
    task = instantiate(cfg.task, _convert_="all")
    task.bind(base_model.tokenizer)
    data = instantiate(cfg.data, _convert_="all")(task=task, network=network, seed=cfg.seed)
    known = {
        "network": network,
        "sites": OmegaConf.to_container(cfg.site) if OmegaConf.is_config(cfg.site) else cfg.site,
        "intervention": instantiate(cfg.intervention, _convert_="all"),
        "classes": {variable: len(task.values(variable)) for variable in task.variables},
        "control": task.control is not None,
    }
    asked = inspect.signature(training).parameters
    return training(**{name: value for name, value in known.items() if name in asked}), data, base_model


def trainer(**settings: Any) -> lightning.Trainer:
    return lightning.Trainer(**{"max_epochs": 2, **QUIET, **settings})


def weights(training: Training, base_model: itrain.BaseModel, folder: Path) -> dict[str, Tensor]:
    return load_file(export(training, folder, base_model=base_model) / "intervention.safetensors")


@pytest.mark.filterwarnings(CLOSED_FORM)
@pytest.mark.parametrize("name", FITS)
def test_trainer_fit_alone_gives_the_weights_of_the_command_line(name: str, tmp_path: Path) -> None:
    words = words_of(name)
    assert main(["fit", *words, f"output={tmp_path}"]) == 0
    (folder,) = [path.parent for path in tmp_path.rglob("config.yaml")]
    module, data, base_model = built(words)
    precision = next((word.split("=")[1] for word in words if "precision" in word), None)
    trainer(precision=precision).fit(module, data)
    found = weights(module, base_model, tmp_path / "alone")
    expected = load_file(folder / "export" / "intervention.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.filterwarnings(CLOSED_FORM)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_a_cohort_has_the_weights_of_its_own_fit(name: str, tmp_path: Path) -> None:
    alone, data, base_model = built(words_of(name))
    trainer().fit(alone, data)
    member, data, _ = built(words_of(name))
    assert isinstance(member, AlignmentSearch)
    with torch.random.fork_rng():
        other = AlignmentSearch(network=member.network, sites="layer4.block_output@last", intervention=itrain.DAS)
    trainer().fit(Cohort(members={"it": member, "other": other}, optimizer=ADAM), data)
    base, source = torch.randn(2, 50, 80)
    torch.testing.assert_close(
        *(each.trained[member.sites[0]].hardened()(base, source) for each in (member, alone)), atol=1e-4, rtol=1e-4
    )
    if name != "full rotation":  # rows that nothing swaps have gradients of rounding alone, which Adam magnifies
        expected = weights(alone, base_model, tmp_path / "alone")
        for key, value in weights(member, base_model, tmp_path / "member").items():
            torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-4)


# --- the Trainer's verbs


def pairs(network: Any, **settings: Any) -> CounterfactualDataModule:
    task = Gender()
    task.bind(load_embedded().tokenizer)
    sizes = {"train_pairs": 64, "validation_pairs": 32, "test_pairs": 32, "batch_size": 16}
    return CounterfactualDataModule(task=task, network=network, **{**sizes, **settings})


def search(**settings: Any) -> tuple[AlignmentSearch, CounterfactualDataModule]:
    lightning.seed_everything(0, verbose=False)
    network = make_network(load_embedded().model)
    given = {"sites": SITE, "intervention": itrain.DAS, "optimizer": ADAM, **settings}
    return AlignmentSearch(network=network, **given), pairs(network)


def test_validate_test_and_predict_run_alone() -> None:
    module, data = search()
    runner = trainer()
    (validated,) = runner.validate(module, data, verbose=False)
    (tested,) = runner.test(module, data, verbose=False)
    assert "validation/iia_argmax" in validated and "test/random_subspace/iia_argmax" in tested
    (logits,) = runner.predict(module, data)  # type: ignore[misc]
    examples = data.datasets["test"].examples
    with torch.no_grad():
        expected = module.interchange(examples, module.trained)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["DAS", "Boundless DAS", "probes", "ReFT", "LoRA", "IIT by LoRA"])
def test_a_checkpoint_needs_the_network_alone(name: str, tmp_path: Path) -> None:
    module, data, base_model = built(words_of(name))
    runner = trainer(max_epochs=1)
    runner.fit(module, data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    network = make_network(load_embedded().model, trainable=type(module).trains_model)
    loaded = type(module).load_from_checkpoint(tmp_path / "run.ckpt", network=network)
    expected = weights(module, base_model, tmp_path / "before")
    found = weights(loaded, base_model, tmp_path / "after")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    data.network = network
    assert runner.test(loaded, data, verbose=False) == runner.test(module, data, verbose=False)


def test_a_checkpoint_says_what_it_lacks(tmp_path: Path) -> None:
    module, data = search(intervention=lambda size: itrain.DAS(size, rank=2))
    runner = trainer(max_epochs=1)
    runner.fit(module, data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    network = module.network
    with pytest.raises(ValueError, match=r"add network=make_network\(model\)"):
        AlignmentSearch.load_from_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="does not hold the argument 'intervention'; add it"):
        AlignmentSearch.load_from_checkpoint(tmp_path / "run.ckpt", network=network)
    with pytest.raises(ValueError, match=r"a checkpoint of itrain\.training\.alignment\.AlignmentSearch, not of"):
        ProbeTraining.load_from_checkpoint(tmp_path / "run.ckpt", network=network)
    given = partial(itrain.DAS, rank=2)
    loaded = AlignmentSearch.load_from_checkpoint(tmp_path / "run.ckpt", network=network, intervention=given)
    assert torch.equal(loaded.trained[loaded.sites[0]].subspace.rows, module.trained[module.sites[0]].subspace.rows)


def test_statistics_that_were_loaded_are_not_fitted_again(tmp_path: Path) -> None:
    module, data, _ = built(words_of("difference of means"))
    with pytest.warns(UserWarning, match="no optimizer"):
        trainer().fit(module, data)
    again, _, _ = built(words_of("difference of means"))
    again.load_state_dict(module.state_dict())
    other = pairs(again.network, seed=7)
    before = {key: value.clone() for key, value in again.exported.state_dict().items()}
    trainer().test(again, other, verbose=False)
    assert all(torch.equal(value, before[key]) for key, value in again.exported.state_dict().items())


@pytest.mark.parametrize("name", ["difference of means", "mean ablation", "tracing"])
def test_a_test_without_a_fit_learns_the_statistics(name: str) -> None:
    fitted, data, _ = built(words_of(name))
    fitted.prepare(data_set_up(data))
    tested, data, _ = built(words_of(name))
    trainer().test(tested, data, verbose=False)
    expected = fitted.exported.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in tested.exported.state_dict().items())


def data_set_up(data: SplitDataModule) -> SplitDataModule:
    data.setup("fit")
    return data


def test_statistics_need_all_training_data() -> None:
    module, data, _ = built(words_of("difference of means"))
    data.setup("test")
    with pytest.raises(ValueError, match="AlignmentSearch learns statistics of all training data"):
        trainer().test(module, dataloaders=data.test_dataloader(), verbose=False)


@pytest.mark.filterwarnings(CLOSED_FORM)
def test_loaders_without_a_data_module_train_alike() -> None:
    with_data, data, _ = built(words_of("mean ablation"))
    trainer().fit(with_data, data)
    alone, data, _ = built(words_of("mean ablation"))
    data.setup("fit")
    trainer().fit(alone, data.train_dataloader(), data.val_dataloader())
    (found,), (expected,) = (list(each.exported.state_dict().values()) for each in (alone, with_data))
    torch.testing.assert_close(found, expected)


# --- its callbacks and flags


def test_any_logged_figure_stops_a_fit_and_chooses_a_checkpoint(tmp_path: Path) -> None:
    module, data = search()
    stop = EarlyStopping("validation/iia_changing_pairwise", mode="max", stopping_threshold=0.2)
    best = ModelCheckpoint(tmp_path, monitor="validation/iia_preserving_argmax", mode="max", save_top_k=2)
    runner = trainer(max_epochs=40, callbacks=[stop, best], enable_checkpointing=True)
    runner.fit(module, data)
    assert runner.current_epoch < 40 and Path(best.best_model_path).is_file()


def test_a_cohort_s_mean_loss_can_be_watched() -> None:
    module, data = search()
    cohort = Cohort(members={"it": module}, optimizer=ADAM)
    runner = trainer(callbacks=[EarlyStopping("validation/loss", patience=1)])
    runner.fit(cohort, data)
    assert float(runner.callback_metrics["validation/loss"]) == pytest.approx(cohort.found["it/validation/loss"])


def test_gradients_are_clipped() -> None:
    norms = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in pl_module.exported.parameters()]).norm()))

    module, data = search()
    trainer(gradient_clip_val=1e-3, callbacks=[Watch()]).fit(module, data)
    assert norms and max(norms) <= 1.001e-3


def test_a_finished_run_goes_on_at_the_rate_that_the_longer_schedule_has(tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: lightning.Trainer, *rest: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module, data = search()
    runner = trainer(max_epochs=1)
    runner.fit(module, data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    module, data = search()
    trainer(max_epochs=2, callbacks=[Watch()]).fit(module, data, ckpt_path=tmp_path / "run.ckpt")
    extended, rates[:] = list(rates), []
    module, data = search()
    trainer(max_epochs=2, callbacks=[Watch()]).fit(module, data)
    assert extended == rates[4:] and extended[0] > 0


def test_the_first_step_of_trainer_fit_alone_refuses_what_the_answer_cannot_see() -> None:
    module, data = search(sites="layer5.block_output@name")
    with pytest.raises(FirstStepError, match=r"site 'layer5\.block_output@name': DAS has no effect on the label there"):
        trainer().fit(module, data)


def test_trainer_fit_alone_prepares_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = search()
    prepare, asked = module.network.prepare, []
    monkeypatch.setattr(
        module.network, "prepare", lambda *given, **how: asked.append((*given, how)) or prepare(*given, **how)
    )
    trainer().fit(module, data)
    ((groups, bases, sources, how),) = asked
    assert (
        groups == [module.sites] and len(bases) == 3 and len(sources) == 3 and how == {"uses": 2, "read": module.sites}
    )


# --- loops of one's own, and mistakes


class Dropping(nn.Module):
    """A model whose dropout shows in its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(bits)))


def test_train_in_a_loop_of_one_s_own_leaves_the_frozen_model_in_eval_mode() -> None:
    network = make_network(Dropping())
    module = AlignmentSearch(network=network, sites="module:embed.output", intervention=itrain.DAS, hidden_sizes=[8])
    data = CounterfactualDataModule(task=Bits(), network=network, train_pairs=32, keep="all")
    data.setup("fit")
    batch = data.datasets["train"].examples
    expected = module.interchange(batch, module.trained)
    module.train()
    assert torch.equal(module.interchange(batch, module.trained), expected)
    assert module.interchange.interventions.training and not network.model.training


class Unranked(itrain.Intervention):
    """An intervention whose author forgot its rank."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, base: Tensor, source: Tensor | None) -> Tensor:
        return base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intervention": itrain.DAS(80)}, r"not an instance: intervention=DAS or intervention=partial\(DAS, \.\.\.\)"),
        ({"intervention": nn.Linear(80, 80)}, "not an instance"),
        ({"intervention": lambda size: nn.Linear(size, size)}, "it makes a Linear; derive the class from itrain"),
        ({"intervention": Unranked}, r"Unranked does not say its rank; set it .* self\.rank = hidden_size"),
        ({"sites": "layer2.block_outputs@name"}, "block_outputs"),
        ({"sites": ["layer2.block_output@name", "layer9.block_output"]}, "layer9"),
    ],
)
def test_a_mistake_in_python_is_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        search(**settings)
    assert "\n" not in str(caught.value)


def test_sites_are_text_one_or_several_or_mappings() -> None:
    network = make_network(load_embedded().model)
    one = AlignmentSearch(network=network, sites=SITE, intervention=itrain.DAS)
    fields = {"layer": 2, "component": "block_output", "position": "name"}
    several = AlignmentSearch(network=network, sites=[fields, "layer3.mlp_output@last"], intervention=itrain.DAS)
    assert [str(site) for site in several.sites] == [*map(str, one.sites), "layer3.mlp_output@last"]


def test_what_else_is_forgotten_is_named() -> None:
    network = make_network(load_embedded().model)
    with pytest.raises(ValueError, match=r"classes=\{variable: len\(task\.values\(variable\)\)"):
        ProbeTraining(network=network, sites=SITE)
    with pytest.raises(TaskError, match=r"Gender has no tokenizer yet: call .*bind\("):
        CounterfactualDataModule(task=Gender(), network=network).setup("fit")
    module, data = search(optimizer=None)
    with pytest.raises(ValueError, match=r"optimizer=partial\(torch\.optim\.Adam, lr=1e-2\)"):
        trainer().fit(module, data)
