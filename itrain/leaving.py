"""What a run leaves in its folder and on the screen, besides its checkpoints and its export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from itrain.checkpoints import read_checkpoint
from itrain.data.labelled import LabelledDataModule
from itrain.data.responses import ResponseDataModule
from itrain.data.splits import SplitDataModule
from itrain.files import finite, write_json
from itrain.reports.generations import in_words, save_generations
from itrain.reports.terminal import show, suggest, typed
from itrain.reports.token_scores import PAGE, readings_of_run, save_token_scores
from itrain.results.history import rows_before
from itrain.sharing import CONFIG, EXPORT
from itrain.training.base import Training
from itrain.training.finetuning import Finetuning
from itrain.training.judgements import FILE as JUDGEMENTS
from itrain.training.judgements import write_judgements
from itrain.training.monitoring import Monitoring
from itrain.training.steering import Steering
from itrain.trust import trusting

METRICS = "metrics.csv"


def leave_results(module: Training, data: SplitDataModule, results: Mapping[str, float], folder: Path) -> None:
    """Write the final figures, and the texts that they are of; all processes call it, and the first one writes."""
    if isinstance(module, Monitoring) and isinstance(data, LabelledDataModule):
        readings = readings_of_run(module, data)
        if module.trainer.is_global_zero:
            save_token_scores(
                readings, data.task.tokenizer, folder / PAGE, title=f"scores of tokens, {folder.parent.name}"
            )
    if not module.trainer.is_global_zero:
        return
    write_json(folder / "metrics.json", finite(results))
    module.provenance["metrics"] = results
    if isinstance(module, Finetuning) and isinstance(data, ResponseDataModule):
        save_generations(module.generations, data.text, folder)
    if isinstance(module, Steering) and module.judgements:
        write_judgements(folder / JUDGEMENTS, module.judgements)


@rank_zero_only
def show_results(module: Training, data: SplitDataModule, results: Mapping[str, float], folder: Path) -> None:
    """Print what is written, and what comes next: the screen comes last, as it may be gone."""
    texts = None
    if isinstance(module, Finetuning) and isinstance(data, ResponseDataModule):
        texts = in_words(module.generations, data.text)
    show(results, folder, texts)
    commands = {f"itrain report {typed(folder)}": "a page with tables, picture, settings and how to read them"}
    if (folder / EXPORT / CONFIG).is_file():
        export = f"export={typed(folder / EXPORT)}"
        trust = trusting(module.origin["configuration"])
        if texts is not None:
            commands[f'itrain generate {export} prompt="<text>"{trust}'] = "continues a prompt before and after"
        commands[f"itrain test {export} seed=1{trust}"] = "tests the export on other data"
    suggest(commands)


@rank_zero_only
def former_metrics(ckpt: str | None) -> list[dict[str, float]]:
    """The metrics of the run that goes on, up to its checkpoint.

    They are read before anything is logged: a run that was requeued has the same folder, and Lightning begins its file
    anew.
    """
    homes = () if ckpt is None else Path(ckpt).absolute().parents[:2]
    file = next((home / METRICS for home in homes if (home / METRICS).is_file()), None)
    return [] if file is None else rows_before(file, read_checkpoint(str(ckpt))["global_step"])


@rank_zero_only
def continue_metrics(former: Sequence[Mapping[str, float]], trainer: lightning.Trainer) -> None:
    """Begin the metrics of a resumed run with those of the former one."""
    for row in former:
        counts = {name: int(row[name]) for name in ("epoch", "step") if name in row}
        trainer.loggers[0].log_metrics({**row, **counts}, counts["step"])
    if former:
        trainer.loggers[0].save()
