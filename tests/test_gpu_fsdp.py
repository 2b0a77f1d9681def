"""On an accelerator: a model in shards on one device learns what it does whole, and its files are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from itrain.cli import main
from tests.commands import SMALL, only_run
from tests.sharded import figures, in_a_group, require_alike, state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

WORDS = [word for word in SMALL if not word.startswith("trainer.accelerator")]
RUNS = {
    "frozen": ["recipe=das_gender"],
    "trained": ["recipe=das_gender", "training=iit", "training.optimizer._target_=torch.optim.SGD"],
    "adapters": ["recipe=iit_lora_gender", "training.optimizer._target_=torch.optim.SGD"],
    "clipped": ["recipe=das_gender", "training=iit", "trainer.gradient_clip_val=0.1", "trainer.precision=bf16-mixed"],
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("run", RUNS)
def test_shards_on_one_device_learn_what_the_whole_model_does(run: str) -> None:
    words = [*RUNS[run], *WORDS]
    assert main(["fit", *words, "trainer=gpu", "network.replay=off", "output=whole"]) == 0
    with in_a_group():
        assert main(["fit", *words, "trainer=fsdp", "trainer.devices=1", "output=sharded"]) == 0
    whole, sharded = (only_run(Path(folder)) for folder in ("whole", "sharded"))
    near = 5e-2 if run == "clipped" else 1e-4
    require_alike(state(sharded), state(whole), rel=near)
    require_alike(*(load_file(each / "export" / "intervention.safetensors") for each in (sharded, whole)), rel=near)
    assert figures(sharded) == pytest.approx(figures(whole), abs=5e-2)
    assert main(["fit", f"ckpt={sharded}", "trainer=gpu", "trainer.max_epochs=3", "output=resumed"]) == 0
