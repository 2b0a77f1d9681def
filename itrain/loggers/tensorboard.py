"""TensorBoard: a folder of event files for each fit; ``tensorboard --logdir outputs`` shows them in the browser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.image import imread

from itrain.loggers.base import FinishedFit, beyond_the_test, captions, require_package
from itrain.loggers.runs import Identity, identify_results, legible
from itrain.results.best import BEST, best_table
from itrain.results.markdown import markdown
from itrain.results.run import RunSummary
from itrain.results.summary import SweepSummary

READ = "how_to_read"
"""The end of the names of texts beside pictures, which have no captions here."""


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

    @rank_zero_only
    def identify(self, identity: Identity) -> None:
        self.log_hyperparams(dict(identity.config))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(legible(metrics), step)

    @rank_zero_only
    def log_run(self, summary: RunSummary, figure: Path) -> None:
        self.experiment.add_image("figure", imread(figure), dataformats="HWC")
        for name, table in summary.named_tables.items():
            self.experiment.add_text(name, markdown(table.columns, table.lines))
        if summary.caption:
            self.experiment.add_text(f"figure/{READ}", summary.caption)
        self.log_metrics(beyond_the_test(summary))
        # Lightning has ended the run by now: nothing else would write what is still in the queue.
        self.experiment.close()

    def log_fit(self, fit: FinishedFit) -> None:
        logger = TensorBoard(save_dir=self.save_dir, run=fit.name)
        logger.log_hyperparams(dict(fit.identity.config), fit.figures)
        for epoch in fit.curve:
            logger.log_metrics(epoch, step=int(epoch["epoch"]))
        logger.experiment.close()

    def log_results(self, sweep: str, summary: SweepSummary, pictures: Mapping[str, Path]) -> None:
        logger = TensorBoard(save_dir=self.save_dir, run="results")
        for name, file in pictures.items():
            logger.experiment.add_image(name, imread(file), dataformats="HWC")
            logger.experiment.add_text(f"{name}/{READ}", captions(summary).get(name, ""))
        best = best_table(summary.best)
        logger.experiment.add_text(BEST, markdown(best.columns, best.lines))
        logger.log_hyperparams(dict(identify_results(sweep, summary).config))
        logger.experiment.close()
