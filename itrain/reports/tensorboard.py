"""TensorBoard: a folder of event files for each fit; ``tensorboard --logdir outputs`` shows them in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import TensorBoardLogger

from itrain.reports.tracking import FinishedFit, require_package

if TYPE_CHECKING:
    import pandas


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, and sweeps: a fit is a run with its settings as hyperparameters.

    Args:
        save_dir: where the runs are kept; in the folder of the run unless told otherwise.
        run: the name of the run among those of the folder.

    Raises:
        RuntimeError: tensorboard is not installed.
    """

    def __init__(self, *, save_dir: str = ".", run: str = "") -> None:
        require_package("tensorboard")
        super().__init__(save_dir, name="tensorboard", version=run, default_hp_metric=False)

    def log_fit(self, fit: FinishedFit) -> None:
        logger = TensorBoard(save_dir=self.save_dir, run=fit.name)
        logger.log_hyperparams(fit.settings, fit.figures)
        for epoch in fit.curve:
            logger.log_metrics(epoch, step=int(epoch["epoch"]))
        logger.experiment.close()

    def log_results(self, sweep: str, frame: pandas.DataFrame, heat_maps: Path) -> None:
        from matplotlib.image import imread

        logger = TensorBoard(save_dir=self.save_dir, run="results")
        logger.experiment.add_image("heat_maps", imread(heat_maps), dataformats="HWC")
        logger.experiment.close()
