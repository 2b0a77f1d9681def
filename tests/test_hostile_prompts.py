"""Words, texts and files that `itrain generate` and `itrain run` are given and cannot use end in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

import itrain
from itrain import files
from itrain.files import one_a_line
from itrain.generating import RequestError, requested
from itrain.runs.tables import Table
from itrain.tasks import TaskError

SITE = "layer1.block_output@last"


def test_a_file_of_prompts_is_read_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfMary walked\r\n\r\nJohn\x0band\xc2\x85Mary\rAnn\n")
    assert one_a_line(file) == ["Mary walked", "John\x0band\x85Mary", "Ann"]
    monkeypatch.setattr(files, "MOST_TEXT", 2**20)
    with pytest.raises(ValueError, match="'/dev/zero' has more than 1 MiB"):
        one_a_line(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["do_sample=maybe"], "do_sample=maybe: give true or false"),
        (["num_beams=0"], "num_beams=0: give a whole number from 1"),
        (["num_return_sequences=true"], "give a whole number from 1"),
        (["max_new_tokens=1.5"], "give a whole number from 1"),
        (["strength=1", "strength=2"], "strength is given twice"),
        (["acts=!!python/object/apply:os.system [x]"], "the value cannot be read"),
    ],
)
def test_a_setting_of_generation_that_is_none_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        requested(["prompt=x", *words], others=())


def test_a_word_without_a_value_is_no_prompt() -> None:
    request, rest = requested(["prompt", "prompts"], others=())
    assert not request.prompts and rest == ["prompt", "prompts"]


def test_a_key_within_a_group_is_left_to_the_group() -> None:
    """However near it is to a key of its own: 'quantization' is to 'continuation'."""
    words = ["model.quantization=int8"]
    assert requested(["prompt=x", *words], others=("model",))[1] == words


def test_half_a_character_is_refused_by_name() -> None:
    """As the command line makes of a byte that is no UTF-8."""
    model = itrain.load_embedded()
    with pytest.raises(TaskError, match=r"the text 'Mary \\udcff' is no Unicode: it has '\\udcff'"):
        model.run("Mary \udcff", SITE, itrain.Zero)
    with pytest.raises(ValueError, match="is no Unicode"):
        model.run("Mary walked because").probability("\ud800")


def test_a_message_shows_the_beginning_of_a_long_prompt() -> None:
    with pytest.raises(TaskError) as found:
        itrain.load_embedded().run("x" * 10**5)
    assert len(str(found.value)) < 400


def test_a_page_and_a_terminal_act_on_no_prompt() -> None:
    table = Table(["<script>\x1b[2J"], ["<b>", ""], [("</td><img>\n", 0.5)])
    assert (
        "<script" not in table._repr_html_() and "<img" not in table._repr_html_() and "<b>" not in table._repr_html_()
    )
    assert "\x1b" not in table._repr_html_() and "\x1b" not in repr(table) and len(repr(table).splitlines()) == 3
