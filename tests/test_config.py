"""Configurations: what composes, what is refused, and with which words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from itrain import config, shipped
from itrain.config import ConfigError, check, compose
from itrain.files import read_yaml

if TYPE_CHECKING:
    from nowhere import Unknown

SITE = {"layer": 2, "component": "block_output", "position": "name"}
# Launchers are of sweeps, and need their plugins.
GROUPS = {group: choices for group, choices in config.group_choices().items() if group != "launcher"}
CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices]


DECLARED = [
    "task.inputs={a:[1,2]}",
    "task.mechanisms={b:a,c:b}",
    "task.template='{a}'",
    "task.output=c",
    "task.variables=b",
]


class Optimizer:
    def __init__(
        self, parameters: Sequence[float], *, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.9)
    ) -> None: ...


class Part:
    def __init__(
        self,
        size: int,
        *,
        rank: int = 1,
        mode: Literal["fast", "exact"] = "fast",
        folder: Path | None = None,
        make: Callable[..., Optimizer] | None = None,
        parts: Sequence[Part] = (),
        weights: Mapping[str, float] | None = None,
        other: Unknown | None = None,
    ) -> None: ...


def open_part(**settings: object) -> torch.nn.Module:
    raise NotImplementedError(settings)


def here(name: str) -> str:
    return f"{__name__}.{name}"


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "plain.yaml").write_text(f"# A plain one.\nsite: {json.dumps(SITE)}\ntrainer: {{max_epochs: 2}}\n")
    return folder


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_fits_its_constructor(group: str, choice: str) -> None:
    needed = {
        "hf": ["model.name=x"],
        "pooled": ["model.name=x", "task=sentences"],
        "minilm": ["task=sentences"],
        "towers": ["task=captions"],
        "tracing": ["training.corrupted=layer0.block_input@name"],
        "untrained": ["model.words=a"],
        "model_alignment": ["training.partner={_target_:itrain.tasks.counting.trained_counter,_partial_:true}"],
        "table": ["task.pairs=x.jsonl"],
        "declared": DECLARED,
    }
    check(compose([f"{group}={choice}", *needed.get(choice, [])]))


@pytest.mark.parametrize("recipe", config.recipe_files())
def test_every_recipe_composes_and_fits_its_constructors(recipe: str, recipes: Path) -> None:
    (recipes / "plain.yaml").unlink()
    composed = compose([f"recipe={recipe}"])
    check(composed)
    assert composed.name == recipe


def test_an_override_may_set_what_no_file_lists() -> None:
    composed = compose(["recipe=plain", "intervention.rank=4", "trainer.limit_train_batches=0.5"])
    check(composed)
    assert composed.intervention.rank == 4
    assert composed.trainer.limit_train_batches == 0.5
    assert composed.trainer.max_epochs == 2


def test_the_command_line_wins_over_the_recipe_which_wins_over_the_defaults() -> None:
    assert compose([]).trainer.max_epochs != 2
    assert compose(["recipe=plain"]).trainer.max_epochs == 2
    assert compose(["recipe=plain", "trainer.max_epochs=3"]).trainer.max_epochs == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe=plian", "there is no recipe 'plian', did you mean 'plain'?"),
        ("recipe=nope.yaml", "recipe: there is no file 'nope.yaml'"),
        ("model=pythia-7m", "there is no model 'pythia-7m', did you mean 'pythia-70m'?"),
        ("model=./mine", "there is no model './mine' among the choices; a folder or a name on the hub is model=hf"),
        ("model=user/model", "a folder or a name on the hub is model=hf model.name=user/model"),
        ("model=hf", "model.name has no value; add model.name=<value>"),
        ("model={name:x}", "set its keys one by one: model.name=x"),
        ("intervention.rnk=4", "intervention.rnk: DAS takes no 'rnk', did you mean 'intervention.rank'?"),
        ("intervention.site=layer4.block_output", "DAS takes no 'site'; 'site' stands alone: site=<value>"),
        ("trainer.max_epoch=3", "trainer.max_epoch: Trainer takes no 'max_epoch', did you mean 'trainer.max_epochs'?"),
        ("trainer.max_epochs=abc", 'trainer.max_epochs: expected an integer or null, not "abc"'),
        ("trainer.max_epochs=2.5", "trainer.max_epochs: expected an integer or null, not 2.5"),
        ("trainer.precision=bf16-mixd", "did you mean 'bf16-mixed'?"),
        ("training.optimizer.lr=fast", 'training.optimizer.lr: expected a number or Tensor, not "fast"'),
        ("training.optimizer._target_=torch.optim.Adm", "did you mean 'torch.optim.Adam'?"),
        ("intervention._target_=itrain.interventions.dass.DAS", "did you mean 'itrain.interventions.das.DAS'?"),
        ("intervention._target_=nowhere.DAS", "cannot import 'nowhere.DAS': No module named 'nowhere'"),
        ("model._target_=os.path", "'os.path' is neither a class nor a function"),
        ("~model._target_", "model: needs _target_"),
        ("~model", "model: none is given; choose one with model=<choice>"),
        ("rank=4", "rank: no such key, did you mean 'intervention.rank'?"),
        ("seeds=1", "seeds: no such key, did you mean 'seed'?"),
        ("interventon=das", "interventon: no such key, did you mean 'intervention'?"),
        ("seed=abc", 'seed: expected an integer, not "abc"'),
        ("seed.x=3", "seed: expected an integer"),
        ("site=layer2", "site 'layer2': expected layer<N>.<component>"),
        ("site.laye=3", "site.laye: a site has no 'laye', did you mean 'layer'?"),
        ("site=[]", "at least one site is needed"),
        ("intervention.rank=2,4", "gives several values"),
        ("foo", "'foo' cannot be read; write key=value"),
        ("--multirun", "'--multirun' cannot be read"),
        ("name=[1", "'name=[1' cannot be read"),
        ("hydra.run.dir=x", "Hydra's own settings have no effect here"),
        ("output=${oc.env:ITRAIN_NOPE}", "ITRAIN_NOPE"),
        ("ckpt=nope.ckpt", "ckpt: there is no checkpoint at 'nope.ckpt'"),
        ("ckpt=recipes", "ckpt: there is no checkpoint at 'recipes'"),
        ("export=recipes", "export: there is no intervention_config.json in 'recipes'"),
    ],
)
def test_a_wrong_request_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose([override]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["logger=null"], ["intervention=null", "training=probing"]])
def test_a_part_that_is_not_needed_can_be_left_out(words: list[str]) -> None:
    composed = compose(words)
    check(composed)
    assert composed[words[0].removesuffix("=null")] is None


@pytest.mark.parametrize(
    ("overrides", "site"),
    [
        ([], "layer2.block_output@name"),
        (["site.layer=3"], SITE | {"layer": 3}),
        (["recipe=plain", "site.layer=3"], SITE | {"layer": 3}),
        (["recipe=plain", "site.position=-1"], SITE | {"position": -1}),
        (["recipe=plain", "site=layer1.mlp_output@last"], "layer1.mlp_output@last"),
        (["site.position=last", "site.head=1"], SITE | {"position": "last", "head": 1}),
        (
            ["site={write:layer1.mlp_output@last,read:layer2.mlp_output@name}"],
            {"write": "layer1.mlp_output@last", "read": "layer2.mlp_output@name"},
        ),
        (
            ["recipe=plain", "site={gender:layer1.mlp_output@last}"],
            {"gender": "layer1.mlp_output@last"},
        ),
        (["recipe=plain", "site.read=layer1.mlp_output@last"], {"write": SITE, "read": "layer1.mlp_output@last"}),
        (
            ["site.read=layer1.mlp_output@last", "site.read.layer=2", "site.write.head=1"],
            {
                "write": SITE | {"head": 1},
                "read": {"layer": 2, "component": "mlp_output", "position": "last"},
            },
        ),
        (
            ["site={gender:layer1.mlp_output@last}", "site.gender.layer=2"],
            {"gender": {"layer": 2, "component": "mlp_output", "position": "last"}},
        ),
        (["site=[layer1.mlp_output,layer2.mlp_output]"], ["layer1.mlp_output", "layer2.mlp_output"]),
        (["recipe=plain", "site=[layer1.mlp_output,layer2.mlp_output]"], ["layer1.mlp_output", "layer2.mlp_output"]),
        (
            ["site=[layer1.mlp_output,layer2.mlp_output]", "site.1.layer=5"],
            ["layer1.mlp_output", {"component": "mlp_output", "layer": 5}],
        ),
    ],
)
def test_a_site_is_text_a_mapping_or_a_list_and_its_parts_can_be_set(overrides: list[str], site: object) -> None:
    composed = compose(overrides)
    check(composed)
    assert OmegaConf.to_container(composed)["site"] == site  # type: ignore[index,call-overload]


def test_recipes_nest_inherit_and_stack(recipes: Path) -> None:
    (recipes / "paper").mkdir()
    (recipes / "paper" / "child.yaml").write_text(
        "defaults: [/recipe/plain, override /intervention: full_vector]\nseed: 7\n"
    )
    child = compose(["recipe=paper/child"])
    assert (child.name, child.seed, child.trainer.max_epochs) == ("paper/child", 7, 2)
    assert child.intervention._target_.endswith("FullVector")
    assert compose(["recipe=[plain,paper/child]"]).name == "plain+paper/child"


def test_a_recipe_is_also_a_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [plain]\nseed: 5\n")
    mine = compose([f"recipe={tmp_path}/mine.yaml"])
    assert (mine.name, mine.seed, mine.trainer.max_epochs) == ("mine", 5, 2)


def test_recipes_of_the_current_folder_win_over_those_that_ship(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shipped"
    (folder / "recipes").mkdir(parents=True)
    for name, seed in (("plain", 1), ("other", 2)):
        (folder / "recipes" / f"{name}.yaml").write_text(f"seed: {seed}\n")
    find = shipped.shipped
    monkeypatch.setattr(shipped, "shipped", lambda name: folder / name if name == "recipes" else find(name))
    assert compose(["recipe=plain"]).seed == 0
    assert compose(["recipe=other"]).seed == 2
    assert list(config.recipe_files()) == ["other", "plain"]


def test_a_recipe_that_was_edited_renamed_or_removed_is_seen(recipes: Path) -> None:
    file = recipes / "changing.yaml"
    for seed in (1, 23):
        file.write_text(f"seed: {seed}\n")
        assert compose(["recipe=changing"]).seed == seed
    file.rename(recipes / "renamed.yaml")
    assert compose(["recipe=renamed"]).seed == 23
    with pytest.raises(ConfigError, match="there is no recipe 'changing'"):
        compose(["recipe=changing"])
    (recipes / "child.yaml").write_text("defaults: [changing]\n")
    with pytest.raises(ConfigError, match="changing"):
        compose(["recipe=child"])


def test_a_recipe_that_inherits_from_itself_is_refused(recipes: Path) -> None:
    (recipes / "loop.yaml").write_text("defaults: [loop]\n")
    with pytest.raises(ConfigError, match="recipe 'loop' inherits from itself"):
        compose(["recipe=loop"])


def test_a_broken_recipe_matters_only_where_it_is_chosen(recipes: Path) -> None:
    (recipes / "broken.yaml").write_text("seed: 1\nsite: [a\nmodel: b\n")
    (recipes / "list.yaml").write_text("- a\n")
    compose(["recipe=plain"])
    with pytest.raises(ConfigError, match=r"broken.yaml' line 3"):
        compose(["recipe=broken"])
    with pytest.raises(ConfigError, match="expected key: value at the top"):
        compose(["recipe=list"])


def test_a_recipe_that_names_a_missing_choice_is_refused(recipes: Path) -> None:
    (recipes / "gone.yaml").write_text("defaults: [override /model: nope]\n")
    with pytest.raises(ConfigError, match="nope"):
        compose(["recipe=gone"])


def test_a_checkpoint_brings_the_configuration_of_its_run(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "plain" / "then"
    saved = compose(
        ["recipe=plain", "trainer=ddp_cpu", "trainer.max_epochs=3", "intervention.rank=4", "training.optimizer.lr=1e-5"]
    )
    checkpoint = run / "checkpoints" / "epoch=1-step=2.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"state_dict": {}}, checkpoint)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    for path in (run, checkpoint):
        composed = compose([f"ckpt={path}", "seed=3", "trainer=cpu"])
        check(composed)
        assert composed.ckpt == str(checkpoint)
        assert (composed.name, composed.seed) == ("plain", 3)
        assert (composed.intervention.rank, composed.training.optimizer.lr) == (4, 1e-5)
        assert composed.trainer == compose(["trainer=cpu", "trainer.max_epochs=3"]).trainer
    assert "rank" not in compose([f"ckpt={run}", "recipe=plain"]).intervention


def test_an_export_brings_the_configuration_it_was_trained_with(tmp_path: Path) -> None:
    saved = compose(["recipe=plain", "intervention.rank=4"])
    container = OmegaConf.to_container(saved) | {"ckpt": "a checkpoint that is gone"}  # type: ignore[operator]
    (tmp_path / "intervention_config.json").write_text(json.dumps({"configuration": container}))
    composed = compose([f"export={tmp_path}", "site.layer=5"])
    check(composed)
    assert (composed.intervention.rank, composed.site.layer, composed.ckpt) == (4, 5, None)
    assert composed.export == str(tmp_path)


def test_paths_are_taken_as_they_are_written() -> None:
    for path in ("a=b/c d/it's(1).x", r"back\slash", "{a,b}"):
        assert compose([f"output={path}"]).output == path


def whole(part: Mapping[str, Any]) -> dict[str, Any]:
    plain = OmegaConf.to_container(compose([]))
    assert isinstance(plain, dict)
    return {**{str(key): value for key, value in plain.items()}, "model": dict(part)}


@pytest.mark.parametrize(
    "part",
    [
        {"size": 3},
        {"_args_": [3], "rank": 2},
        {"size": 3, "make": {"_target_": here("Optimizer"), "_partial_": True}},
        {"size": 3, "folder": "a/b", "mode": "exact", "weights": {"a": 1}},
        {"size": 3, "make": {"_target_": here("Optimizer"), "_partial_": True, "lr": 1, "betas": [0.1, 1]}},
        {"size": 3, "parts": [{"_target_": here("Part"), "size": 1}]},
        {"size": 3, "other": "what the type checker alone knows"},
        {"_target_": here("open_part"), "anything": 1},
    ],
)
def test_what_fits_the_signature_passes(part: dict[str, Any]) -> None:
    check(whole({"_target_": here("Part"), **part}))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "model.size has no value; add model.size=<value>"),
        ({"sze": 1}, "model.sze: Part takes no 'sze', did you mean 'model.size'?"),
        ({"_partial_": True, "rank": 2}, "model._partial_: leave it out"),
        ({"size": "3"}, 'model.size: expected an integer, not "3"'),
        ({"size": True}, "model.size: expected an integer, not true"),
        ({"size": 3, "mode": "exakt"}, "expected fast or exact, not \"exakt\", did you mean 'exact'?"),
        ({"size": 3, "make": "adam"}, "model.make: expected a mapping with _target_ or null"),
        ({"size": 3, "weights": {"a": "b"}}, "model.weights: expected a mapping or null"),
        (
            {"size": 3, "make": {"_target_": here("Optimizer"), "_partial_": True, "betas": [1, "x"]}},
            'model.make.betas: expected a list of (a number), not [1, "x"]',
        ),
        ({"size": 3, "make": {"_target_": here("Optimizer")}}, "model.make: add model.make._partial_=true"),
        ({"size": 3, "parts": [{"_target_": here("Part"), "size": 1, "rnk": 2}]}, "model.parts[0].rnk: Part takes no"),
        ({"size": 3, "other": 1, "zzz": 2}, "there is size, rank, mode"),
    ],
)
def test_what_does_not_fit_the_signature_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(whole({"_target_": here("Part"), **part}))
    assert message in str(caught.value)


def test_the_resolved_configuration_is_plain_data() -> None:
    composed = compose(["recipe=plain", "logger=wandb"])
    assert composed.logger.name == "plain"
    assert yaml.safe_load(OmegaConf.to_yaml(composed)) == OmegaConf.to_container(composed)


def test_choices_are_read_as_hydra_reads_them() -> None:
    """Without Hydra's reader 1e-3 would be a text."""
    for group, files in shipped.group_files().items():
        for name, file in files.items():
            own = {key: value for key, value in read_yaml(file).items() if key != "defaults"}
            found = shipped.choice(group, name)
            assert {key: found[key] for key in own} == own, f"{group}={name}"
