"""What is printed in a run is itrain's own; which warnings end a test, and which are only listed."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from itrain.reports.silence import REMARKS, silence_others, silence_records
from tests.commands import SMALL

ROOT = Path(__file__).parents[1]

PROGRAM = """
import json, sys, sysconfig
from pathlib import Path

import rich

STANDARD = str(Path(sysconfig.get_paths()["stdlib"]))
DRAWING = (str(Path(rich.__file__).parent), "<string>")


def author(frame):
    # The innermost code that is neither Python's own nor of what draws tables and bars.
    while frame is not None:
        file = frame.f_code.co_filename
        if file == sys.modules["warnings"].__file__ or file == sys.modules["logging"].__file__:
            return file
        own = file.startswith(STANDARD) and "site-packages" not in file
        if not (own or file.startswith(DRAWING) or file.startswith("<frozen")):
            return file
        frame = frame.f_back
    return "nobody"


class Watched:
    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        if text.strip():
            written.append((author(sys._getframe(1)), text))
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


notes, runs = {}, json.loads(sys.argv[1])
sys.stdout, sys.stderr = Watched(sys.stdout), Watched(sys.stderr)
import logging, warnings
from itrain.cli import main
from itrain.reports import silence

for name, words in runs.items():
    if name == "loud":
        silence.REMARKS = silence.LOGGERS = ()
        warnings.simplefilter("default", UserWarning)
    written = notes[name] = []
    assert main(words) == 0
print("NOTES" + json.dumps(notes), file=sys.stdout.stream)
"""

FIT = ["fit", "recipe=das_gender", *SMALL]
SWEEP = ["sweep", "recipe=das_vs_probe_gender", "sweep.layers=[2]", "sweep.positions=[name]", *SMALL]
RUNS = {"fit": FIT, "sweep": SWEEP, "quiet": [*FIT, "--quiet"], "loud": FIT}
"""The last with nothing silenced."""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """What each run wrote through Python, by which file, and all that came out of the process."""
    runs = {name: [*words, f"output={tmp_path_factory.mktemp(name)}"] for name, words in RUNS.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(runs)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    output, _, notes = done.stdout.rpartition("NOTES")
    return json.loads(notes), output


@pytest.mark.parametrize("run", ["fit", "sweep", "quiet"])
def test_every_line_of_a_run_is_its_own(run: str, process: tuple[dict[str, list[tuple[str, str]]], str]) -> None:
    written = process[0][run]
    assert [(file, text) for file, text in written if not Path(file).is_relative_to(ROOT / "itrain")] == []
    assert written, "a run prints what it found"


def test_nothing_goes_past_python(process: tuple[dict[str, list[tuple[str, str]]], str]) -> None:
    """As it could from a library's compiled code or own process."""
    notes, output = process
    assert sorted(output.split()) == sorted(" ".join(text for run in notes.values() for _, text in run).split())


def test_a_strangers_line_would_be_noticed(process: tuple[dict[str, list[tuple[str, str]]], str]) -> None:
    said = [text for file, text in process[0]["loud"] if Path(file).name == "warnings.py"]
    assert any(re.search(remark, text) for remark in REMARKS for text in said)


class Notice(UserWarning):
    """Somebody's own kind."""


WARNINGS = [
    ("itrain", UserWarning, "the rank is high", True),
    ("itrain.networks.plan", FutureWarning, "will change", True),
    ("itrain.networks.plan", DeprecationWarning, "is deprecated", True),
    ("tests.models", DeprecationWarning, "is deprecated", True),
    ("test_sites", PendingDeprecationWarning, "will be deprecated", True),
    ("conftest", FutureWarning, "will change", True),
    ("torch.nn.functional", UserWarning, "shapes differ and are broadcast", True),
    ("lightning.pytorch.trainer", Notice, "nothing is logged", True),
    ("torch.utils", FutureWarning, "will change", False),
    ("pyparsing", DeprecationWarning, "'oneOf' is another name", False),
    ("pandas.core", PendingDeprecationWarning, "will change", False),
    ("pkg_resources", UserWarning, "\npkg_resources is Deprecated as an API", False),
    ("itrain_of_others", DeprecationWarning, "is another name", False),
]


@pytest.mark.parametrize(("module", "category", "text", "ends"), WARNINGS)
def test_warnings_that_we_raise_or_provoke_end_a_test(
    module: str, category: type[Warning], text: str, ends: bool
) -> None:
    with warnings.catch_warnings(record=True) as listed:
        try:
            warnings.warn_explicit(text, category, "somewhere.py", 1, module=module)
            ended = False
        except Warning:
            ended = True
    assert (ended, len(listed)) == (ends, 0 if ends else 1)


def test_a_profiler_that_was_asked_for_is_heard() -> None:
    silence_others()
    assert logging.getLogger("lightning.pytorch.profilers.profiler").isEnabledFor(logging.INFO)
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("torchao", "Failed to load /x/_C_cutlass_90a.abi3.so: Could not load this library", False),
        ("torchao", "Skipping import of cpp extensions due to incompatible torch version.", False),
        ("torchao", "the weights are not finite", True),
        ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported", False),
        ("torch.utils._pytree", "Failed to load", True),
        ("accelerate.big_modeling", "Some parameters are on the meta device because they were offloaded", False),
    ],
)
def test_records_that_are_no_news_go_untold(name: str, text: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    silence_records()
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)  # torch hands no records on to the root
    logger.warning(text)
    logger.removeHandler(caplog.handler)
    assert text in caplog.messages if told else text not in caplog.messages


def test_a_script_that_loads_a_model_hears_of_other_packages_what_it_must_and_keeps_its_loggers() -> None:
    """In plain Python nothing has silenced the loggers for good; only while a model is loaded are they kept back."""
    program = (
        "import logging, itrain\n"
        "itrain.load_embedded()\n"
        "import logging\n"
        "from itrain.reports.silence import RECORDS\n"
        "assert not any(logging.getLogger(name).filters for name in RECORDS)\n"
        "logging.getLogger('torchao').warning('Failed to load a user must see this')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith("a user must see this") and not done.stdout
