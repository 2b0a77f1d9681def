"""Tasks whose inputs are vectors and images, and the networks that come with them."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import pytest
import torch

from itrain.data import collate
from itrain.tasks.base import Split
from itrain.tasks.digits_pvr import CORNERS, DigitsPVR, pvr_cnn
from itrain.tasks.hierarchical_equality import HierarchicalEquality, mlp, trained_mlp

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


# --- hierarchical equality


def test_every_kind_of_pair_is_as_likely_and_changes_half_of_the_labels() -> None:
    task, random = HierarchicalEquality(), Random(0)
    batch = collate(task, [task.sample(random, "train") for _ in range(3000)])
    assert batch.groups == (("left",), ("left", "right"), ("right",))
    for group in range(3):
        rows = batch.group == group
        assert float(rows.float().mean()) == pytest.approx(1 / 3, abs=0.04)
        assert float(batch.changes[rows].float().mean()) == pytest.approx(1 / 2, abs=0.06)
    assert float(batch.counterfactual_label.float().mean()) == pytest.approx(1 / 2, abs=0.04)


def test_equal_objects_are_equal_vectors_and_splits_share_none() -> None:
    task, random = HierarchicalEquality(objects=100), Random(0)
    seen = {}
    for split in SPLITS:
        settings = [task.sample(random, split).base for _ in range(200)]
        seen[split] = {setting[place] for setting in settings for place in "wxyz"}
        w, x, y, z = task.inputs(settings).arguments["input"].split(4, 1)
        same = [task.causal_model.run(setting)["same"] for setting in settings]
        assert (((w == x).all(1) == (y == z).all(1)).tolist()) == same
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert sum(map(len, seen.values())) == 100


def test_the_false_hypothesis_interchanges_an_object() -> None:
    task, random = HierarchicalEquality(hypothesis="first_argument"), Random(0)
    batch = collate(task, [task.sample(random, "test") for _ in range(2000)])
    assert batch.groups == (("first",),)
    assert float(batch.changes.float().mean()) == pytest.approx(1 / 2, abs=0.05)
    pair = task.sample(random, "test")
    new = task.causal_model.interchange(pair.base, pair.sources)
    assert new["same"] == task.causal_model.run({**pair.base, "w": pair.sources["first"]["w"]})["same"]


def test_equalities_say_nothing_about_the_identity_of_an_object() -> None:
    task, random = HierarchicalEquality(hypothesis="first_argument"), Random(0)
    seen: dict[tuple[bool, ...], list[bool]] = defaultdict(list)
    for pair in (task.sample(random, "test") for _ in range(4000)):
        base, source = task.causal_model.run(pair.base), task.causal_model.run(pair.sources["first"])
        equal = task.causal_model.interchange(pair.base, pair.sources)["left"]
        seen[base["left"], base["right"], source["left"], source["right"]].append(bool(equal))
    assert len(seen) == 16
    for known, equal in seen.items():
        assert sum(equal) / len(equal) == pytest.approx(1 / 2, abs=0.12), known


def test_a_network_is_taught_the_same_way_each_time() -> None:
    state = torch.get_rng_state()
    one, again, other = (trained_mlp(steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for weight, same, different in zip(one.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same) and not torch.equal(weight, different)
    assert [name for name, _ in mlp(num_layers=2).named_children()] == ["hidden1", "hidden2", "scores"]


def test_a_network_learns_the_task_from_objects_that_it_is_not_tested_on() -> None:
    task, random = HierarchicalEquality(), Random(0)
    batch = collate(task, [task.sample(random, "test") for _ in range(2000)])
    with torch.no_grad():
        answers = trained_mlp()(batch.base.arguments["input"]).argmax(1)
    assert float((answers == batch.base_label).float().mean()) > 0.99


# --- pointer-value retrieval


def test_the_pointer_says_which_digit_is_the_answer() -> None:
    task, random = DigitsPVR(), Random(0)
    for _ in range(100):
        run = task.causal_model.run(task.sample(random, "train").base)
        digits = {corner: task.digits[run[f"{corner}_scan"]] for corner in CORNERS}
        pointed = {0: "top_right", 4: "bottom_left", 7: "bottom_right"}
        corner = pointed[max(first for first in pointed if first <= digits["top_left"])]
        assert run["answer"] == digits[corner]


def test_scans_lie_in_their_corners_and_splits_share_none() -> None:
    task, random = DigitsPVR(), Random(0)
    seen = {}
    for split in SPLITS:
        settings = [task.sample(random, split).base for _ in range(300)]
        images = task.inputs(settings).arguments["input"]
        assert images.shape == (300, 1, 16, 16) and pvr_cnn()(images[:2]).shape == (2, 10)
        for corner in CORNERS:
            rows = slice(0, 8) if corner.startswith("top") else slice(8, 16)
            columns = slice(0, 8) if corner.endswith("left") else slice(8, 16)
            scans = [setting[f"{corner}_scan"] for setting in settings]
            assert torch.equal(images[:, 0, rows, columns], task.images[scans])
        seen[split] = {scan for setting in settings for scan in setting.values()}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
