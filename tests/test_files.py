"""Files: a full disk, an error or a kill in the middle of a write leaves the former file whole."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pandas
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO
from matplotlib.figure import Figure

from itrain.config.saved import last_checkpoint
from itrain.files import FolderError, replacing, replacing_folder, write_json, write_text
from itrain.reports.figures import save_figure
from itrain.results.table import write
from itrain.training.safeguards import WholeCheckpoints, safeguard

BIG = 1 << 20


def save_checkpoint(path: Path) -> None:
    WholeCheckpoints().save_checkpoint({"state_dict": {"weight": torch.rand(BIG // 4)}}, path)


def save_table(path: Path) -> None:
    with replacing(path) as beside:
        pandas.DataFrame({"value": torch.rand(BIG // 4).numpy()}).to_parquet(beside)


def save_picture(path: Path) -> None:
    figure = Figure(figsize=(8, 8))
    figure.subplots().imshow(torch.rand(400, 400).numpy())
    save_figure(figure, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "last.ckpt": save_checkpoint,
    "text.txt": lambda path: write_text(path, "x" * BIG),
    "metrics.json": lambda path: write_json(path, ["x" * BIG]),
    "rows.json": lambda path: write([{"value": "x" * BIG}], path),
    "table.parquet": save_table,
    "figure.png": save_picture,
    "figure.svg": save_picture,
}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few kilobytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_former_file_and_is_named(name: str, tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / name
    path.write_text("former")
    with pytest.raises(OSError, match="File too large") as caught:
        WRITERS[name](path)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.read_text() == "former"
    assert os.listdir(tmp_path) == [name]


class Deadly:
    """Ends the process that writes it."""

    def __reduce__(self) -> Any:
        os._exit(9)


def test_a_process_killed_while_it_writes_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    former = tmp_path / "run" / "last.ckpt"
    torch.save({"epoch": 3}, former)
    if (child := os.fork()) == 0:
        try:
            WholeCheckpoints().save_checkpoint({"large": torch.rand(BIG), "deadly": Deadly()}, former)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(path.name.endswith(".part") for path in former.parent.iterdir()), "it was killed in the middle"
    assert torch.load(former, weights_only=True) == {"epoch": 3}
    assert last_checkpoint(tmp_path) == former, "what was left of the other is not taken for one"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_new_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "file") as beside:
            beside.write_text("text")
            beside.chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def fill_too_much(target: Path) -> None:
    with replacing_folder(target) as beside:
        (beside / "weights").write_text("third")
        raise OSError(errno.ENOSPC, "full")


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    for text in ("first", "second"):
        with replacing_folder(target) as beside:
            (beside / "weights").write_text(text)
        assert (target / "weights").read_text() == text
    with pytest.raises(OSError, match="full") as caught:
        fill_too_much(target)
    assert caught.value.filename == str(target)
    assert (target / "weights").read_text() == "second"
    assert os.listdir(tmp_path / "deep") == ["export"]


def test_a_folder_that_holds_something_else_is_left(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("weights", "thesis.tex"):
        (mine / name).write_text("mine")
    for target, said in ((mine, r"holds 'thesis\.tex', which would be lost"), (mine / "weights", "is a file")):
        with pytest.raises(FolderError, match=said), replacing_folder(target) as beside:
            (beside / "weights").write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "thesis.tex", "weights"]
    assert {path.read_text() for path in mine.iterdir()} == {"mine"}


def test_checkpoints_need_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR may be full, and on another file system."""
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    trainer = quiet_trainer(tmp_path)
    safeguard(trainer, tmp_path / "last.ckpt")
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_another_way_of_writing_checkpoints_is_kept(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, plugins=[AsyncCheckpointIO()])
    safeguard(trainer)
    assert isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)


def quiet_trainer(folder: Path, **settings: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
