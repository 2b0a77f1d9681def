"""The contract that every featurizer keeps, found by walking the package, and closed forms of the fixed bases."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

import itrain
from itrain.interventions.bases import ClusterCentres, RandomBasis, SingularVectors
from itrain.interventions.featurizers import Featurizer, Subspace, interchange
from itrain.interventions.masking import FixedMask, Mask
from itrain.interventions.sae import Dictionary, SparseAutoencoder
from itrain.saes import SAE, TinyWorldSAE
from tests.sae_files import HIDDEN, arrays, sae_lens

Make = Callable[[Path], Featurizer]
NEEDS: dict[type[Featurizer], Make] = {
    Subspace: lambda to: Subspace(HIDDEN, rank=2),
    SparseAutoencoder: lambda to: SparseAutoencoder(weights()),
    SAE: lambda to: SAE(HIDDEN, source=str(sae_lens(to, arrays()))),
    TinyWorldSAE: lambda to: trained_already(to),
}
"""Those that are not made of the number of features alone."""
DROPPING: list[Make] = [
    lambda to: SparseAutoencoder(weights(), error="drop"),
    lambda to: SAE(HIDDEN, source=str(sae_lens(to, arrays())), error="drop"),
]
"""Those that lose something by their user's choice."""


def weights() -> Dictionary:
    found = arrays()
    return Dictionary(*(torch.from_numpy(found[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")))


def trained_already(folder: Path) -> TinyWorldSAE:
    """Of its own folder, into which files were put."""
    name = "tiny_world_layer1_features320_sparsity1_steps1500_seed0"
    sae_lens(folder / name, arrays())
    (folder / name / "figures.json").write_text("{}")
    return TinyWorldSAE(HIDDEN, folder=str(folder))


def discovered() -> list[type[Featurizer]]:
    found = []
    for package in ("itrain.interventions", "itrain.saes"):
        paths = importlib.import_module(package).__path__
        for info in pkgutil.walk_packages(paths, f"{package}."):
            for value in vars(importlib.import_module(info.name)).values():
                own = isinstance(value, type) and value.__module__ == info.name and issubclass(value, Featurizer)
                if own and not inspect.isabstract(value):
                    found.append(value)
    return found


FEATURIZERS = discovered()
with_each = pytest.mark.parametrize("cls", FEATURIZERS, ids=lambda cls: cls.__name__)


def seen(count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64) * torch.arange(1, HIDDEN + 1) + 2


def build(cls: type[Featurizer], folder: Path) -> Featurizer:
    torch.manual_seed(0)
    made = NEEDS[cls](folder) if cls in NEEDS else cls(HIDDEN)  # type: ignore[call-arg]
    made.double()
    if made.fits_activations:
        made.fit(seen())
    return made


def pair(*batch: int) -> tuple[Tensor, Tensor]:
    base, other = torch.randn(2, *batch, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return base, other


def test_the_walk_finds_the_featurizers() -> None:
    assert {"Identity", "PrincipalComponents", "Rotation", "RandomBasis", "SAE"} <= {
        cls.__name__ for cls in FEATURIZERS
    }
    assert all(issubclass(each, itrain.Featurizer) for each in FEATURIZERS)


@with_each
@pytest.mark.parametrize("batch", [(), (3,), (3, 2)])
def test_decodes_what_it_encoded_and_writes_to_nothing(
    cls: type[Featurizer], batch: tuple[int, ...], tmp_path: Path
) -> None:
    featurizer, (base, _) = build(cls, tmp_path), pair(*batch)
    kept = base.clone()
    features, error = featurizer.encode(base)
    assert featurizer.exact and features.shape == (*batch, featurizer.num_features) and error.shape == base.shape
    torch.testing.assert_close(featurizer.decode(features, error), base, rtol=0, atol=1e-10)
    assert torch.equal(base, kept)


@pytest.mark.parametrize("make", DROPPING)
def test_what_drops_an_error_says_so_and_decodes_features_alone(make: Make, tmp_path: Path) -> None:
    """Then two activations of equal features are decoded as one, whatever else they hold."""
    featurizer, (base, _) = make(tmp_path).double(), pair(5)
    features, error = featurizer.encode(base)
    assert not featurizer.exact
    assert (featurizer.decode(features, error) - base).abs().max() > 0.1
    torch.testing.assert_close(error, error[:1].expand_as(error))


@with_each
def test_a_mask_that_is_shut_changes_nothing_and_one_that_is_open_swaps_the_features(
    cls: type[Featurizer], tmp_path: Path
) -> None:
    featurizer, (base, source) = build(cls, tmp_path), pair(6)
    torch.testing.assert_close(interchange(base, source, featurizer, 0.0), base, rtol=0, atol=1e-10)
    (features, error), (others, _) = featurizer.encode(base), featurizer.encode(source)
    torch.testing.assert_close(interchange(base, source, featurizer, 1.0), featurizer.decode(others, error))
    assert not torch.equal(features, others)


@with_each
def test_its_state_round_trips(cls: type[Featurizer], tmp_path: Path) -> None:
    one, (base, _) = build(cls, tmp_path), pair(4)
    torch.manual_seed(1)
    other = (NEEDS[cls](tmp_path) if cls in NEEDS else cls(HIDDEN)).double()  # type: ignore[call-arg]
    other.load_state_dict(one.state_dict(), strict=True)
    torch.testing.assert_close(other.encode(base)[0], one.encode(base)[0])


# --- closed forms


def test_singular_vectors_are_those_of_numpy_without_centring() -> None:
    activations, (base, source) = seen(), pair(5)
    basis = SingularVectors(HIDDEN, rank=3).double()
    basis.fit(activations)
    rows = numpy.linalg.svd(activations.numpy())[2][:3]
    assert numpy.allclose(numpy.abs((basis.rows.numpy() * rows).sum(1)), 1, atol=1e-10)
    assert not numpy.allclose(
        numpy.abs(numpy.linalg.svd((activations - activations.mean(0)).numpy())[2][0] @ rows[0]), 1
    )
    gate = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    kept = rows[[0, 2]]
    expected = base.numpy() + (source - base).numpy() @ kept.T @ kept
    torch.testing.assert_close(interchange(base, source, basis, gate).numpy(), expected, rtol=0, atol=1e-10)


def test_centres_of_clusters_are_those_of_scikit_learn_and_their_coordinates_of_least_squares() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    activations, (base, source) = seen(200), pair(5)
    activations = activations + 30 * torch.eye(HIDDEN, dtype=torch.float64)[torch.arange(200) % 3]
    basis = ClusterCentres(HIDDEN, clusters=3).double()
    basis.fit(activations)
    found = cluster.KMeans(3, n_init=10, random_state=0).fit(activations.numpy()).cluster_centers_
    apart = found - activations.mean(0).numpy()
    directions = apart / numpy.linalg.norm(apart, axis=1, keepdims=True)
    order = numpy.argmax(basis.rows.numpy() @ directions.T, axis=1)
    assert sorted(order) == [0, 1, 2] and numpy.allclose(basis.rows.numpy(), directions[order], atol=1e-8)
    rows = basis.rows.numpy()
    coordinates = numpy.linalg.lstsq(rows.T, (source - base).numpy().T, rcond=None)[0].T
    gate = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    expected = base.numpy() + coordinates * gate.numpy() @ rows
    torch.testing.assert_close(interchange(base, source, basis, gate).numpy(), expected, rtol=0, atol=1e-9)


def test_a_random_basis_is_orthonormal_and_is_told_by_its_seed() -> None:
    basis, (base, source) = RandomBasis(HIDDEN).double(), pair(5)
    rows = basis.rows
    torch.testing.assert_close(rows @ rows.T, torch.eye(HIDDEN, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(rows, RandomBasis(HIDDEN).double().rows)
    assert not torch.equal(rows, RandomBasis(HIDDEN, seed=1).double().rows)
    gate = (torch.arange(HIDDEN) < 2).double()
    expected = base + ((source - base) @ rows.T * gate) @ rows
    torch.testing.assert_close(interchange(base, source, basis, gate), expected)


@pytest.mark.parametrize("make", [SingularVectors, ClusterCentres, RandomBasis])
def test_masks_are_fitted_to_them_and_have_random_features_as_their_control(make: type[Featurizer]) -> None:
    mask = Mask(HIDDEN, featurizer=partial(make)).double()  # type: ignore[arg-type]
    assert mask.fits_activations is make.fits_activations
    mask.fit(seen())
    with torch.no_grad():
        mask.gate.logits[:2] = 1
        mask.gate.logits[2:] = -1
    control = mask.hardened().untrained()
    assert isinstance(control, FixedMask) and control.rank == 2
    assert not list(mask.featurizer.parameters()), "a given basis is not learned"


def test_faults_are_told_in_one_line() -> None:
    with pytest.raises(ValueError, match="rank 9 does not fit an activation of 6 features"):
        SingularVectors(HIDDEN, rank=9)
    with pytest.raises(ValueError, match="clusters=1: give 2 or more"):
        ClusterCentres(HIDDEN, clusters=1)
    with pytest.raises(ValueError, match="restarts=0: give 1 or more"):
        ClusterCentres(HIDDEN, restarts=0)
    with pytest.raises(RuntimeError, match=r"call fit\(activations\) first"):
        SingularVectors(HIDDEN).encode(torch.zeros(2, HIDDEN))
