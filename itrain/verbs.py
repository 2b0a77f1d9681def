"""The command line's verbs as functions: they do the same, and return what it leaves in a folder as objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Quote, QuotedString

from itrain import config
from itrain.data.splits import SplitDataModule
from itrain.models import BaseModel
from itrain.placements import SITE_FIELDS, Placement
from itrain.reports.pictures import Picture
from itrain.results.history import read_history
from itrain.results.run import summarise_run
from itrain.results.table import read_curves
from itrain.run_folder import run_folder
from itrain.sharing import EXPORT
from itrain.signatures import ConfigError
from itrain.sites import Site
from itrain.training.base import Training

if TYPE_CHECKING:
    import pandas

_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE)
"""Text that Hydra's grammar takes as it is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """A finished fit.

    Args:
        module: the trained module, with the network it was trained on.
        figures: the final figures, by name.
        folder: what ``itrain fit`` leaves: config.yaml, metrics.csv, metrics.json, export/, figure.png.
        base_model: the model.
        data: the data module.
    """

    module: Training
    figures: Mapping[str, float]
    folder: Path
    base_model: BaseModel
    data: SplitDataModule

    @property
    def export(self) -> Path:
        """The folder of the export, for ``itrain.load``."""
        return self.folder / EXPORT

    @property
    def picture(self) -> Picture:
        """The figures beside the curve of the training; a notebook draws it."""
        return Picture(self.folder / "figure.png")

    @property
    def curves(self) -> pandas.DataFrame:
        """What was logged in training and validation, one row a step: ``fit.curves["train/loss"].dropna().plot()``."""
        return read_history(self.folder / "metrics.csv")

    def __repr__(self) -> str:
        named = [f"  {name}  {value:.4g}" for name, value in self.figures.items() if re.fullmatch("test/[^/]*", name)]
        return "\n".join([repr(self.module), *named, f"  folder  {self.folder}"])

    def _repr_html_(self) -> str:
        found = [f"<pre>{escape(repr(self.module))}</pre>"]
        for table in summarise_run(self.figures).tables:
            heads = "".join(f"<th>{escape(f'{upper} {lower}'.strip())}</th>" for upper, lower in table.heads)
            rows = "".join(
                f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
                for name, cells in table.rows.items()
            )
            found.append(f"<table><caption>{escape(table.title)}</caption><tr><th></th>{heads}</tr>{rows}</table>")
        return "".join([*found, f"<div>{escape(str(self.folder))}</div>"])


@dataclass(frozen=True, eq=False, kw_only=True)
class Sweep:
    """A finished sweep.

    Args:
        table: one row a fit, as ``itrain.read_results`` reads it.
        folder: what ``itrain sweep`` leaves: config.yaml, results.parquet, heat maps, report.html.
    """

    table: pandas.DataFrame
    folder: Path

    @property
    def curves(self) -> pandas.DataFrame:
        """The validation figures, one row a fit and epoch."""
        return read_curves(self.folder)

    @property
    def report(self) -> Path:
        """The page with all maps and curves."""
        return self.folder / "report.html"

    @property
    def picture(self) -> Picture:
        """The heat maps, side by side; a notebook draws them."""
        return Picture(self.folder / "heat_maps.png")

    def __repr__(self) -> str:
        return f"{self._shown().to_string(index=False)}\nfolder  {self.folder}"

    def _repr_html_(self) -> str:
        return f"{self._shown().to_html(index=False)}<div>{escape(str(self.folder))}</div>"

    def _shown(self) -> pandas.DataFrame:
        """The table without what is the same in all rows, and without commands."""
        varies = [name for name in self.table if name != "command" and self.table[name].astype(str).nunique() > 1]
        return self.table.loc[:, varies or list(self.table)]


def fit(*words: str, **settings: Any) -> Fit:
    """Train, test and export, as ``itrain fit`` does: ``itrain.fit("das_gender", site="layer2.block_output@name")``.

    Args:
        words: as on the command line; one without ``=`` is a recipe.
        settings: parts and keys of a configuration. A mapping sets keys of a part: ``intervention={"rank": 4}``.

    Raises:
        ConfigError: a setting is unknown, or cannot be written in a configuration.
    """
    from itrain import experiment

    configuration = config.request(list(_words(words, settings)))
    if configuration.export is not None:
        raise ConfigError("export=<folder> is for 'itrain test', not for a fit")
    with run_folder(configuration) as folder:
        parts, figures = experiment.fitted(configuration, folder)
    return Fit(module=parts.module, figures=figures, folder=folder, base_model=parts.base_model, data=parts.data)


def sweep(*words: str, **settings: Any) -> Sweep:
    """Fit a grid and compare, as ``itrain sweep`` does: ``itrain.sweep("das_gender", sweep={"layers": [1, 2]})``.

    The arguments are those of :func:`fit`.

    Raises:
        ConfigError: a setting is unknown, or cannot be written in a configuration.
        RunError: a job failed, after all others have run.
    """
    from itrain.sweeps.run import sweep as run_sweep

    configuration = config.request(list(_words(words, settings)), sweeps=True)
    for key in ("export", "ckpt"):
        if configuration[key] is not None:
            raise ConfigError(f"{key}=<path> is not for 'sweep', which trains from the start; leave it out")
    with run_folder(configuration) as folder:
        table = run_sweep(configuration, folder)
    return Sweep(table=table, folder=folder)


def _words(words: Sequence[str], settings: Mapping[str, Any]) -> Iterator[str]:
    """The words of a command line that say the same."""
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(f"a word is text, such as 'das_gender' or 'site.layer=3', and not {_kind(word)}")
        yield word if "=" in word or word.startswith("~") else f"recipe={word}"
    for key, value in settings.items():
        if isinstance(value, Mapping) and (key != "site" or _is_part_of_a_site(value)):
            for name, each in value.items():
                yield f"{key}.{name}={_written(f'{key}.{name}', each)}"
        else:
            yield f"{key}={_written(key, value)}"


def _is_part_of_a_site(value: Mapping[str, Any]) -> bool:
    """Whether a mapping names some fields of a site, and so changes the recipe's; one with a component is whole."""
    return bool(value) and set(value) < set(SITE_FIELDS) and "component" not in value


def _kind(value: object) -> str:
    return getattr(value, "__name__", f"a {type(value).__name__}")


def _written(key: str, value: Any) -> str:
    """A value in Hydra's grammar.

    Raises:
        ConfigError: a configuration cannot hold it.
    """
    if isinstance(value, Placement):
        value = value.described()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path | Site):
        text = str(value)
        return text if _PLAIN.fullmatch(text) else QuotedString(text=text, quote=Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_written(key, str(name))}:{_written(key, each)}" for name, each in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(_written(key, each) for each in value) + "]"
    raise ConfigError(
        f"{key}: {_kind(value)} cannot be written in a configuration; name it as in `itrain list`, or put "
        "objects of your own together by hand: lightning.Trainer().fit(module, data)"
    )
