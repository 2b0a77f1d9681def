"""Sparse autoencoders of the embedded model, which are trained when they are asked for."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from itrain.interventions.sae import Error
from itrain.models import load_embedded
from itrain.saes.source import SAE
from itrain.saes.training import FIGURES, train_sae, write_sae
from itrain.tiny_world import Grammar

SENTENCES = 8_000
"""Sentences of the tiny world that give the activations, all tokens but the first."""
BATCH = 256


class TinyWorldSAE(SAE):
    """An autoencoder of the embedded model's residual stream, trained on sentences of its world and kept in a folder.

    The first use trains it, in under a minute, and writes it in SAELens's layout; later uses read it. Its loss and
    sparsity are in ``figures.json`` beside the weights.

    Args:
        hidden_size: features of the activation.
        folder: holds the folders of such autoencoders, each named after its settings.
        layer: the block whose output it decodes.
        features, sparsity, steps, seed: as in :func:`~itrain.saes.training.train_sae`.
        error: ``keep`` or ``drop`` what the features do not say, as in :class:`~itrain.saes.source.SAE`.

    Raises:
        SAEError: what is in the folder cannot be read, or the site has other features than the embedded model.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        folder: str = "outputs/saes",
        layer: int = 1,
        features: int = 320,
        sparsity: float = 1.0,
        steps: int = 1500,
        seed: int = 0,
        error: Error = "keep",
    ) -> None:
        name = f"tiny_world_layer{layer}_features{features}_sparsity{sparsity:g}_steps{steps}_seed{seed}"
        home = Path(folder).expanduser() / name
        if not (home / FIGURES).is_file():
            found = activations_of_sentences(layer)
            trained = train_sae(found, features=features, sparsity=sparsity, steps=steps, seed=seed)
            write_sae(trained, home, hook_name=f"blocks.{layer}.hook_resid_post")
        super().__init__(hidden_size, source=str(home), error=error)


def activations_of_sentences(layer: int) -> Float[Tensor, "tokens hidden"]:
    """What the embedded model's block puts out at the tokens of sentences, but the first, at which all are alike."""
    grammar = Grammar(0)
    sentences = [" ".join(grammar.sentence()) for _ in range(SENTENCES)]
    (read,) = load_embedded().read(sentences, f"layer{layer}.block_output", batch_size=BATCH).values()
    rows = read[:, 1:].flatten(0, 1)
    return rows[~rows.isnan().any(1)]
