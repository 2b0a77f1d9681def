"""Checkpointed: a LightningModule whose checkpoints say what it is made of, and to which base model they belong."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning

from itrain.checkpoints import ORIGIN, forget_foreign_files, read_checkpoint, require_origin
from itrain.factories import FactoryError, class_path, describe, rebuild
from itrain.identity import identity
from itrain.models import fingerprint
from itrain.networks.base import Network, require_network
from itrain.training.building import require_unplaced

if TYPE_CHECKING:
    from typing_extensions import Self

ARGUMENTS = "training"
"""The key of a checkpoint that holds the constructor's arguments."""


class Checkpointed(lightning.LightningModule):
    """Keeps its constructor's arguments in checkpoints as plain data, and loads none of another base model.

    A subclass begins its constructor with ``self.remember(locals())``.
    """

    trains_model: ClassVar[bool]
    network: Network

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.base_identity: Mapping[str, Any] | None = None
        """What the base model computed before it was trained; None: it is not trained."""
        self.origin: dict[str, Any] = {}
        """What checkpoints are bound to: the fingerprint of the base model as loaded, and the run's configuration."""

    def remember(self, arguments: Mapping[str, Any]) -> None:
        """Keep the constructor's arguments, given as its ``locals()``."""
        network, optimizer = arguments.get("network"), arguments.get("optimizer")
        if "network" in arguments:
            require_network(network)
        if not (optimizer is None or callable(optimizer)):
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} is built of the training's own parameters, so give what builds "
                f"it: optimizer=partial(torch.optim.{type(optimizer).__name__}, lr=1e-2)"
            )
        others = ("self", "network", "__class__")
        self.arguments = {name: value for name, value in arguments.items() if name not in others}
        if self.trains_model:
            require_unplaced(arguments["network"].model)
            # Before adapters are added; later there is no telling what the model was at the start.
            self.origin["fingerprint"] = fingerprint(arguments["network"].model)
            self.base_identity = identity(arguments["network"].model)

    def loaded_fingerprint(self) -> str:
        """The fingerprint of the base model as loaded."""
        if "fingerprint" not in self.origin:
            self.origin["fingerprint"] = fingerprint(self.network.model)
        return self.origin["fingerprint"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the constructor's arguments as plain data, which loading runs no code from, and the origin."""
        known = {}
        for name, value in self.arguments.items():
            try:
                known[name] = describe(name, value)
            except FactoryError:
                continue
        unknown = sorted({*inspect.signature(type(self)).parameters} - {"network", *known})
        checkpoint[ARGUMENTS] = {"class": class_path(type(self)), "arguments": known, "unknown": unknown}
        self.loaded_fingerprint()
        checkpoint[ORIGIN] = self.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another base model, unless the checkpoint replaces all of its weights; forget foreign files.

        Raises:
            ValueError: naming both fingerprints.
        """
        weights = (f"network.{name}" for name, _ in self.network.named_parameters(remove_duplicate=False))
        if checkpoint.get(ORIGIN) and not all(name in checkpoint["state_dict"] for name in weights):
            require_origin(checkpoint, self.loaded_fingerprint(), place="the checkpoint")
        forget_foreign_files(checkpoint)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        trust: Sequence[str] = (),
        **arguments: Any,
    ) -> Self:
        """The module of a checkpoint: ``AlignmentSearch.load_from_checkpoint(path, network=network)``.

        Arguments that are not given are read from the checkpoint, which is data: their classes come from itrain, from
        the package of this class, or from packages that ``trust`` names.

        Raises:
            ValueError: no network is given or it is of another base model, or the checkpoint is damaged, of another
                class, lacks an argument, or names what is not trusted.
        """
        place = f"'{checkpoint_path}'"
        # Mapped, not read: only the arguments are needed here, and a co-trained model's weights are large.
        saved = read_checkpoint(checkpoint_path)
        found = saved.get(ARGUMENTS, {"class": class_path(cls), "arguments": {}})
        if found["class"] != class_path(cls):
            raise ValueError(f"{place} is a checkpoint of {found['class']}, not of {class_path(cls)}")
        if "network" in inspect.signature(cls).parameters and "network" not in arguments:
            raise ValueError(f"{place} holds no base model: add network=make_network(model)")
        trusted = [*trust, *({cls.__module__.split(".")[0]} - {"itrain"})]
        known = {
            name: rebuild(name, each, str(checkpoint_path), trust=trusted)
            for name, each in found["arguments"].items()
            if name not in arguments
        }
        if lacks := [name for name in found.get("unknown", ()) if name not in arguments]:
            raise ValueError(f"{place} does not hold the argument '{lacks[0]}'; add it to the call")
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only, **{**known, **arguments}
        )
