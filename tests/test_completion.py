"""Completion in a shell: what a word may become, told without torch or Hydra."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from itrain.cli import main
from itrain.completion import SHELLS, candidates
from itrain.help import VERBS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ([""], list(VERBS)),
        (["sw"], ["sweep"]),
        (["fit", "rec"], ["recipe="]),
        (["fit", "recipe=das_gen"], ["recipe=das_gender", "recipe=das_gender_pythia"]),
        (["fit", "intervention=bound"], ["intervention=boundless_das"]),
        (["fit", "intervention."], ["intervention.rank="]),
        (["fit", "recipe=mask_entity", "intervention."], ["intervention.gate="]),
        (["fit", "intervention=full_vector", "intervention.r"], []),
        (["fit", "training.optimizer."], ["training.optimizer.lr="]),
        (["fit", "trainer.max_ep"], ["trainer.max_epochs="]),
        (["fit", "data.filter=t"], []),
        (["fit", "ckpt=x"], ["<files>"]),
        (["test", "export="], ["<files>"]),
        (["list", "inter"], ["intervention"]),
        (["completion", "b"], ["bash"]),
        (["fit", "model.name="], ["<files>"]),
        (["fit", "recipe=./"], ["<files>"]),
        (["task", "check", "pairs"], ["<files>"]),
        (["task", "check", "pairs.jsonl", "model=tiny"], ["model=tiny_world"]),
        (["explain", "das_g"], ["das_gender", "das_gender_pythia"]),
        (["explain", "Boundless"], ["BoundlessDAS"]),
        (["explain", "block_out"], ["block_output"]),
        (["explain", "layer2.block_output", "DA"], []),
        (["list", "jud"], ["judges"]),
        (["fit", "network.replay="], ["network.replay=auto", "network.replay=on", "network.replay=off"]),
        (["sweep", "sweep.m"], ["sweep.methods="]),
    ],
)
def test_a_word_is_completed(words: list[str], some: list[str]) -> None:
    found = candidates(words)
    assert set(some) <= set(found) and bool(found) == bool(some)
    assert all(each.startswith(words[-1]) or each == "<files>" for each in found)


def test_a_recipe_of_the_folder_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "my_own.yaml").write_text("defaults: [{override /intervention: mask}]\n")
    (tmp_path / "recipes" / "broken.yaml").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert candidates(["fit", "recipe=my"]) == ["recipe=my_own"]
    assert "intervention.rank=" not in candidates(["fit", "recipe=my_own", "intervention."])
    assert candidates(["fit", "recipe=broken", "intervention.r"]) == ["intervention.rank="]


def test_completion_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['itrain', '--complete', 'fit', 'trainer.max_ep']\n"
        "from itrain.__main__ import main; main()\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'pydantic', 'lightning'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, "trainer.max_epochs=\n"), done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_read_its_script(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("itrain sw", ["sweep"]),
        ("itrain fit recipe=das_gender_p", ["das_gender_pythia"]),
        ("itrain fit intervention.ra", ["intervention.rank="]),
        ("itrain fit ckpt=scr", ["script"]),
        ("itrain fit ckpt=a", ["a dir"]),
        ("itrain report a", ["a dir"]),
        (r"itrain fit ckpt=a\ d", ["a dir"]),
        ("itrain fit ckpt='a d", ["a dir"]),
        ('itrain test "export=a d', ["export=a dir"]),
        (r"itrain report a\ dir/", ["a dir/x y.ckpt"]),
        ("itrain fit recipe=./scr", ["./script"]),
        ("itrain task check a", ["a dir"]),
    ],
)
def test_bash_completes(line: str, reply: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "a dir").mkdir()
    (tmp_path / "a dir" / "x y.ckpt").touch()
    program = (
        f'itrain() {{ "{sys.executable}" -m itrain "$@"; }}\nsource ./script\nCOMP_LINE={shlex.quote(line)}\n'
        'COMP_POINT=${#COMP_LINE}\n_itrain\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines() == reply, done.stderr


def test_one_shell_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
