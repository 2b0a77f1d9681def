"""The report of a sweep: it holds every fit and command, needs nothing but itself, and answers in a browser."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pandas
import pytest
from browser import CHROMIUM, Page

from itrain.cli import main
from itrain.inputs import ModelInputs
from itrain.models import load_embedded
from itrain.reports.curves import save_curves
from itrain.reports.heat_maps import save_heat_maps
from itrain.reports.html import save_report
from itrain.reports.sweeps import SweepProgress, show_sweep
from itrain.reports.terminal import only_results
from itrain.results.intervals import over_pairs
from itrain.results.tokens import read_tokens, save_tokens
from itrain.sites import Site
from itrain.tasks.gender import Gender
from tests.tables import curves, finished, summary_of, table, with_controls

HOSTILE = "</script><script>alert('a & b')</script>\"><img src=x onerror=alert(1)>"


def words(page: str) -> str:
    """What a page says, without its tags."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))


def page_of(tmp_path: Path, frame: pandas.DataFrame, trained: pandas.DataFrame | None = None) -> str:
    save_report([finished(tmp_path / "sweep", frame, trained=trained)], tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


class Outline(HTMLParser):
    """The tags of a page, each with its attributes, and the text of the cells of its table of fits."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr" and (dict(attrs).get("id") or "").startswith("fit-"):
            self.rows.append([])
            self.inside = True
        elif tag == "td" and self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "tr"

    def handle_data(self, data: str) -> None:
        if self.inside and self.rows[-1]:
            self.rows[-1][-1] += data


def test_every_fit_and_its_command_is_in_the_page(tmp_path: Path) -> None:
    frame = table(ranks=(1, 2), seeds=3)
    outline = Outline(page_of(tmp_path, frame))
    assert [row[-1] for row in outline.rows] == list(frame.command)
    for row, fit in zip(outline.rows, frame.itertuples(), strict=True):
        assert row[:4] == [fit.method, fit.component, str(fit.layer), fit.position]
    # Each fit stands behind one cell of each figure that has a heat map.
    cells = (found.get("data-fits") or "" for tag, found in outline.tags if tag == "button")
    named = [number for cell in cells for number in cell.split()]
    probes = set(frame.index[frame.method == "probing"].astype(str))
    assert sorted(named) == sorted([*map(str, frame.index), *probes])


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(tmp_path, table(ranks=(1, 2)))
    for tag, attributes in Outline(page).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert all(attributes.get(name) is None for name in ("src", "srcset", "action", "data"))
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(|https?://", page)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    frame = table().assign(position=HOSTILE, flag=HOSTILE, command=HOSTILE)
    trained = curves(frame).assign(method=HOSTILE)
    frame.loc[frame.method == "das", "method"] = HOSTILE
    folder = finished(tmp_path / "sweep", frame, name=HOSTILE, trained=trained)
    (folder / "tokens.json").write_text(json.dumps({"text": HOSTILE, "tokens": {HOSTILE: HOSTILE}}))
    save_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    tags = [tag for tag, _ in Outline(page).tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert HOSTILE in unescape(page)


def test_two_hundred_fits_are_under_three_megabytes(tmp_path: Path) -> None:
    frame = table(layers=10, positions=("first", "name", "verb", "connective", "last"))
    assert len(frame) == 200
    frame["command"] += " training.optimizer.lr=0.01" * 10
    page = page_of(tmp_path, with_controls(frame), curves(frame, epochs=50))
    assert len(page.encode()) < 3 * 2**20


def test_the_summary_names_best_sites_controls_and_flags(tmp_path: Path) -> None:
    page = words(page_of(tmp_path, table()))
    assert "250, of which 100 (40%) change the label" in page
    low, high = over_pairs(0.675, 100)
    assert f"das at 0@name +1: {0.675:.2f} ({low:.2f} to {high:.2f}) IIA (argmax), label-changing" in page
    assert "control passes ( ! ), 1 fit: a random subspace of equal rank" in page


def test_a_trace_stands_beside_its_clean_and_corrupted_run(tmp_path: Path) -> None:
    frame = table()
    trace = frame.loc[frame.method == "full_vector", frame.columns[: list(frame).index("command") + 1]].assign(
        window=3,
        answer_probability=0.8,
        flag="",
        **{"corrupted/answer_probability": 0.05, "clean/answer_probability": 0.9},
    )
    page = page_of(tmp_path, trace)
    assert re.findall(r"<th scope=\"col\">(\w+ run)</th>", page) == ["corrupted run", "clean run"]
    assert "<td>0.80</td><td>0.05</td><td>0.90</td>" in page


def test_a_sweep_without_controls_is_not_called_clean(tmp_path: Path) -> None:
    frame = table()
    page = page_of(tmp_path, frame[frame.method == "probing"])
    assert "these controls were not run: random subspace, full vector, random model" in page


def test_several_seeds_show_their_mean_and_interval(tmp_path: Path) -> None:
    low, high = over_pairs(0.6675, 300)
    page = page_of(tmp_path, table(seeds=3))
    assert f"{0.6675:.2f} ({low:.2f} to {high:.2f})" in page and "95% interval over 3 seeds, 300 pairs in all" in page


def test_curves_appear_where_several_ranks_were_swept(tmp_path: Path) -> None:
    assert 'id="over-rank"' not in page_of(tmp_path / "one", table())
    page = page_of(tmp_path / "several", table(ranks=(1, 2, 4)))
    assert 'id="over-rank"' in page
    assert 'aria-label="random subspace, rank 4: IIA (argmax), label-changing pairs: 0.10 (' in page


def test_curves_over_training_name_the_best_fit(tmp_path: Path) -> None:
    assert 'id="over-epoch"' not in page_of(tmp_path / "without", table())
    frame = table(seeds=2)
    page = page_of(tmp_path / "with", frame, curves(frame))
    lines = [found for tag, found in Outline(page).tags if "line" in (found.get("class") or "").split()]
    assert len(lines) == (frame.method == "das").sum()
    # Drawn last, over the others.
    best = frame[frame.method == "das"].iia_changing_argmax.idxmax()
    assert [line["data-fits"] for line in lines if "best" in str(line["class"])] == [str(best)]
    assert lines[-1]["data-fits"] == str(best)
    assert lines[-1]["data-name"] == "das, layer 0, name, seed 0"
    assert lines[-1]["data-details"] == "epoch 1: 0.17\nepoch 4: 0.68"


def test_boundaries_are_shown_where_gates_have_found_a_rank(tmp_path: Path) -> None:
    frame = table()
    assert 'id="over-layer"' not in page_of(tmp_path / "without", frame)
    frame["rank_found"] = frame.layer.astype(float).where(frame.method == "das") * 7 + 3
    page = page_of(tmp_path / "with", frame)
    spots = [found["data-name"] for _, found in Outline(page).tags if found.get("class") == "spot"]
    assert spots == [f"das, layer {layer}, {position}" for position in ("name", "verb") for layer in range(3)]
    assert "rank found: 17.00" in page


def test_curves_are_drawn_for_print_where_a_sweep_has_them(tmp_path: Path) -> None:
    frame = table(ranks=(1, 2))
    save_curves(summary_of(finished(tmp_path / "all", frame, trained=curves(frame))))
    assert {file.name for file in (tmp_path / "all").glob("*.[ps][nv]g")} == {
        f"{name}.{kind}" for name in ("ranks", "training") for kind in ("png", "svg")
    }
    save_curves(summary_of(finished(tmp_path / "gates", table().assign(rank_found=4.0))))
    assert {file.name for file in (tmp_path / "gates").glob("*.svg")} == {"boundaries.svg"}
    save_curves(summary_of(finished(tmp_path / "none", table())))
    assert not list((tmp_path / "none").glob("*.png"))


def test_heat_maps_say_what_stands_at_a_position(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = table().assign(window=1)
    folder = finished(tmp_path / "sweep", frame)
    assert read_tokens(folder).tokens == {}
    base_model, task = load_embedded(), Gender(templates="simple")
    task.bind(base_model.tokenizer)
    inputs = task.inputs([task.causal_model.sample(Random(0))])
    name, verb = str(inputs.texts and inputs.texts[0]).split()[:2]
    sites = [Site(layer=2, component="block_output", position=position) for position in ("name", "verb")]
    save_tokens(inputs, sites, base_model.tokenizer, folder)
    save_report([folder], tmp_path / "report.html")
    page = words((tmp_path / "report.html").read_text())
    assert f'name "{name}"' in page and f'verb "{verb}"' in page
    save_heat_maps(summary_of(folder))
    assert name in (folder / "heat_maps.svg").read_text()
    show_sweep(summary_of(folder))
    assert f'name "{name}", verb "{verb}"' in capsys.readouterr().out


def test_a_model_without_text_has_no_tokens(tmp_path: Path) -> None:
    save_tokens(ModelInputs(arguments={}), [], None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_random_model_and_the_gap_stand_beside_the_controls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = with_controls(table()).assign(window=1)
    frame.loc[frame.method == "das", "flag"] = "random model passes"
    folder = finished(tmp_path / "sweep", frame)
    save_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    low, high = over_pairs(0.97, 200)
    assert f"0.97 ({low:.2f} to {high:.2f})" in page
    assert re.findall(r"<th scope=\"col\">([^<]+)</th>", page)[-2:] == ["random model", "gap"]
    low, high = over_pairs(0.61, 200)
    assert f"<td>0.61 ({low:.2f} to {high:.2f})</td><td>+0.04</td>" in page and "random model: 0.03" in page
    assert "on a randomly initialised model scores about as high" in page
    show_sweep(summary_of(folder))
    told = capsys.readouterr().out
    assert re.search(r"probing +0@name \+1 +0.97 +0.94-0.99 .* 0.61 +\+0.04", told), told


def test_the_model_is_called_by_its_name(tmp_path: Path) -> None:
    assert "model itrain/tiny-world task" in words(page_of(tmp_path, table()))
    own = finished(tmp_path / "own", table(), model="my.models.make_encoder")
    save_report([own], tmp_path / "own.html")
    assert "model make_encoder task" in words((tmp_path / "own.html").read_text())


def test_progress_is_told_once_without_colours_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    def progress() -> str:
        with SweepProgress(quiet=False) as told:
            told.expect(2)
            told.done(
                [
                    {"method": "full_vector", "layer": 1, "position": "a", "iia_changing_argmax": 1.0},
                    {"method": "das", "layer": 2, "position": "b", "iia_changing_argmax": 0.75},
                ]
            )
        return capsys.readouterr().out

    said = progress()
    assert "best 0.75 (das 2@b)" in said and "2/2" in said and "\x1b" not in said
    with only_results():
        assert progress() == ""


def test_quiet_leaves_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["trainer.max_epochs=1", "data.train_pairs=32", "data.validation_pairs=16", "data.test_pairs=32"]
    assert main(["fit", "recipe=das_gender", *words, "trainer.accelerator=cpu", "--quiet"]) == 0
    told = capsys.readouterr()
    lines = told.out.strip().splitlines()
    assert lines[0].strip().startswith("interchange intervention accuracy") and lines[-1].startswith("folder: ")
    assert "Epoch" not in told.out + told.err and "\x1b" not in told.out


def test_several_sweeps_lie_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = table(), table(layers=2, ranks=(1, 4))
    second = second[second.method != "full_vector"]
    both = [finished(tmp_path / "a", first), finished(tmp_path / "b", second, name="ranks")]
    file = tmp_path / "both.html"
    assert main(["report", *map(str, both), f"output={file}"]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    outline = Outline(file.read_text())
    assert [row[0] for row in outline.rows] == ["gender"] * len(first) + ["ranks"] * len(second)
    # Equal settings lie in one row, whether or not a sweep has others beside them.
    page = file.read_text()
    assert page.count("<caption>das, rank 1<br>") == 2
    absent = re.findall(r">([^>]*): not in this sweep", page)
    assert absent == ["full vector", "das, rank 4", "random subspace, rank 4"]


def test_what_is_no_finished_sweep_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("name: gender")
    broken, other = finished(tmp_path / "broken", table()), finished(tmp_path / "other", table().drop(columns="flag"))
    (broken / "results.parquet").write_bytes(b"no parquet")
    good = finished(tmp_path / "good", table())
    (fit := tmp_path / "fit").mkdir()
    for name in ("metrics.json", "tokens.html"):
        (fit / name).touch()
    for words, message in {
        (): "takes the folder of a run or those of sweeps",
        (str(tmp_path / "nowhere"),): "not the folder of a finished sweep",
        (str(fit), str(good)): "it is the folder of a fit, which is shown by metrics.json, tokens.html",
        (str(fit),): f"'{fit / 'metrics.json'}' is damaged",
        (str(unfinished),): "there is no results.parquet in it",
        (str(broken),): "cannot be read",
        (str(other),): "has no column 'flag'",
        (str(good), str(good)): "is named twice",
        (str(good), f"output={tmp_path}/none/report.html"): "No such file",
    }.items():
        assert main(["report", *words]) == 2
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_answers_in_a_browser(tmp_path: Path) -> None:
    frame = table(ranks=(2, 16), seeds=2)
    file = tmp_path / "report.html"
    save_report([finished(tmp_path / "sweep", frame, trained=curves(frame))], file)
    with Page(file, profile=tmp_path / "profile") as page:
        assert page.requests == [file.as_uri()]

        cell = ".heat tbody tr:last-child td:nth-of-type(2) button"
        page.mouse(cell)
        tip = page.run("document.getElementById('tip').innerText")
        assert tip.startswith("das, rank 2, layer 0, verb\n") and "95% interval over 2 seeds" in tip
        assert "flag: control passes" in tip
        assert page.run("!document.getElementById('tip').hidden && document.getElementById('chosen').hidden")

        # What is copied can be pasted.
        page.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        page.mouse(cell, click=True)
        fits = frame[(frame.method == "das") & (frame.layer == 0) & (frame.position == "verb") & (frame["rank"] == 2)]
        assert len(fits) == 2
        assert page.run("document.querySelector('#chosen pre').textContent").split("\n") == list(fits.command)
        said = "document.querySelector('#chosen .copied').textContent"
        page.run(f"new Promise(done => (function wait() {{ {said} ? done() : setTimeout(wait, 10); }})())")
        assert page.run(said) == "Copied:"
        assert page.run("navigator.clipboard.readText()").split("\n") == list(fits.command)

        # The same by keys: an arrow moves, Enter chooses, Escape closes.
        page.press("ArrowLeft")
        assert page.run("document.activeElement.dataset.name") == "das, rank 2, layer 0, name"
        assert page.run("document.getElementById('tip').innerText").startswith("das, rank 2, layer 0, name")
        page.press("Enter")
        assert "@name" in page.run("document.querySelector('#chosen pre').textContent")
        page.press("Escape")
        assert page.run("document.getElementById('chosen').hidden && document.getElementById('tip').hidden")

        # The lines of a plot the same, gone over by keys from the best one down.
        page.mouse(".plot .best")
        assert page.run("document.getElementById('tip').innerText").startswith("das, rank 2, layer 0, name, seed 0\n")
        page.mouse(".plot [data-row] .spot", click=True)
        assert len(page.run("document.querySelector('#chosen pre').textContent").split("\n")) == 2
        page.run("document.querySelector('.plot .best').focus()")
        page.press("ArrowDown")
        page.press("Enter")
        fit = int(page.run("document.activeElement.dataset.fits"))
        assert page.run("document.querySelector('#chosen pre').textContent") == frame.command[fit]
        assert fit != int(page.run("document.querySelector('.plot .best').dataset.fits"))
        page.press("Escape")

        columns = page.run("[...document.querySelectorAll('.sortable thead th')].map(head => head.textContent)")
        at = columns.index("rank") + 1
        column = f"[...document.querySelectorAll('.sortable tbody td:nth-child({at})')].map(cell => cell.textContent)"
        head = f".sortable thead th:nth-child({at})"
        ranked, empty = ["2"] * 24 + ["16"] * 24, [""] * 24
        page.mouse(f"{head} button", click=True)
        assert page.run(column) == ranked + empty
        page.run(f"document.querySelector('{head} button').focus()")
        page.press("Enter")
        assert page.run(column) == ranked[::-1] + empty
        assert page.run(f"document.querySelector('{head}').getAttribute('aria-sort')") == "descending"
        assert page.errors == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_the_reader_s_colours(tmp_path: Path, scheme: str) -> None:
    file, frame = tmp_path / "report.html", table(positions=tuple("abcdefghijkl"))
    save_report([finished(tmp_path / "sweep", frame)], file)
    with Page(file, profile=tmp_path / "profile", width=390, scheme=scheme) as page:
        assert page.run("document.documentElement.scrollWidth") <= 390
        ground = page.run("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
        assert page.errors == []
