"""The model card of a repository of exports, written from what the exports say of their runs.

What an export says may be a stranger's text, so all of it is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from yaml import YAMLError

from itrain import __version__
from itrain.results.claims import claim
from itrain.results.markdown import markdown
from itrain.results.parts import Table
from itrain.results.run import summarise_run
from itrain.sharing.reading import ExportError
from itrain.trust import printable

README = "README.md"
BEGIN, END = "<!-- itrain: what stands from here is written anew by each push -->", "<!-- itrain: to here -->"
NOTE = ("<!-- itrain: on the model in this repository -->", "<!-- itrain: so far -->")
TAGS = ("itrain", "interpretability", "intervention")
CITATION = """\
@software{itrain,
  title = {itrain: train interventions on neural networks},
  author = {{itrain contributors}},
  version = {%s}
}"""
FIGURES = 200
"""The most final figures of an export that a card shows."""
LONGEST = 300
"""The most characters that a card shows of one name."""
_HEAD = re.compile(r"\s*---\r?\n")


def card_of(
    exports: Mapping[str, Mapping[str, Any]],
    repo_id: str,
    *,
    former: str | None = None,
    note: str = "",
    base_model: str | None = None,
) -> str:
    """The text of ``README.md`` for a repository of exports.

    Args:
        exports: the description of each export, by subfolder; that at the top has the name ``""``.
        repo_id: the repository.
        former: the card that was there. What was written to it by hand stays.
        note: Markdown that comes first, below the title; none: the one that was there.
        base_model: on the hub, of what the note describes.

    Raises:
        ExportError: the head of the former card cannot be read.
    """
    from huggingface_hub import ModelCard

    former = former or ""
    try:
        card: Any = ModelCard(former if _HEAD.match(former) else f"---\nlibrary_name: itrain\n---\n{former}")
    except (ValueError, TypeError, YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"'{repo_id}': the head of its {README} cannot be read ({reason}); mend it there") from error
    before, written, after = _parts(card.text)
    note = f"{NOTE[0]}\n{note}\n{NOTE[1]}" if note else _between(written, *NOTE)
    card.data.library_name = "transformers" if note else "itrain"
    card.data.tags = list(dict.fromkeys([*_texts(card.data.tags), *TAGS]))
    if bases := sorted({name for name in (base_model, *map(hub_name, exports.values())) if name}):
        card.data.base_model = bases if len(bases) > 1 else bases[0]
    lines = [f"# {escaped(repo_id)}", *([note] if note else []), *([_introduction(exports)] if exports else [])]
    for name, config in sorted(exports.items()):
        lines += _section(name, config, repo_id)
    lines += ["## Citation", _fenced(CITATION % __version__, "bibtex")]
    card.text = before + "\n\n".join([BEGIN, *lines, END]) + after
    return str(card)


def escaped(text: str) -> str:
    """A stranger's text for a card: as code where it is plain, else without all that Markdown and HTML act on."""
    line = _short(text, LONGEST)
    if re.fullmatch(r"[\w./@+:=,()-]+( [\w./@+:=,()-]+)*", line):
        return f"`{line}`"
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", line)


def line_of(name: str, config: Mapping[str, Any]) -> str:
    """An export in a line: its name, what it trains where, and what was found."""
    found = claim(_figures(config.get("metrics")))
    sites = ", ".join(_texts(config.get("sites")))
    what = f"{_last(config.get('training'))}{f' at {sites}' if sites else ''} on {_base_name(config)}"
    return _short(f"{name or '(at the top)'}  {what}{f': {found}' if found else ''}", 3 * LONGEST)


def note_on_merged(
    config: Mapping[str, Any], repo_id: str, model: str, folded: Mapping[str, str], left: Mapping[str, str]
) -> str:
    """The part of a card on a model into whose weights an export was folded."""
    base = escaped(_base_name(config))
    lines = [f"{base} with what was trained with itrain folded into its weights; it runs without itrain."]
    lines += ["\n".join(f"- folded {escaped(name)}: {escaped(where)}" for name, where in folded.items())]
    if left:
        lines.append("\n".join(f"- **not** folded {escaped(name)}: {_plain(why)}" for name, why in left.items()))
    lines.append(_fenced(f'import transformers\n\nmodel = transformers.{model}.from_pretrained("{repo_id}")', "python"))
    return "\n\n".join([*lines, "What was folded, with figures from before it was:", *_described(config)])


def _introduction(exports: Mapping[str, Mapping[str, Any]]) -> str:
    several = "" if list(exports) == [""] else f" {len(exports)} of them:"
    return (
        "Interventions on a neural network, trained and measured with itrain, as safetensors and JSON: loading them "
        f"runs no code from this repository.{several}"
    )


def _section(name: str, config: Mapping[str, Any], repo_id: str) -> list[str]:
    """The part of the card on one export."""
    run = config.get("configuration")
    lines = [*([f"## {escaped(name)}"] if name else []), *_described(config)]
    address = f"{repo_id}/{name}" if name else repo_id
    trust = [each for each in _texts(config.get("trust")) if re.fullmatch(r"\w+(\.\w+)*", each)]
    packages = ", ".join(trust)
    lines.append(_fenced(f'import itrain\n\ntraining = itrain.load("{address}"{_trusting(trust)})', "python"))
    if isinstance(run, Mapping):
        word = f" trust=[{packages}]" if packages else ""
        lines += ["Work out its figures again:", _fenced(f"itrain test export={address}{word}", "bash")]
    if packages:
        lines.append(f"It names classes of {escaped(packages)}, which are imported only where they are trusted so.")
    return lines


def _described(config: Mapping[str, Any]) -> list[str]:
    """Claim, facts and figures of an export."""
    found = _figures(config.get("metrics"))
    lines = [_claimed(config, found), _facts(config)]
    if not found:
        return [*lines, "No figures were given."]
    summary = summarise_run(found)
    lines += [_drawn(table) for table in summary.tables]
    return lines + (["\n".join(f"- {_plain(line)}" for line in summary.lines)] if summary.lines else [])


def _claimed(config: Mapping[str, Any], found: Mapping[str, float]) -> str:
    said = claim(found)
    subject = f"**{_plain(_last(config.get('training')))}** on {escaped(_base_name(config))}"
    return f"{subject}: {_plain(said)}." if said else f"{subject}."


def _facts(config: Mapping[str, Any]) -> str:
    """Where and what, by name."""
    run, base = (dict(_items(config.get(part))) for part in ("configuration", "base_model"))
    rows = {
        "base model": [_base_name(config), *([f"revision {base['revision']}"] if base.get("revision") else [])],
        "site": _texts(config.get("sites")),
        "intervention": _called(config.get("intervention")),
        "task": _called(run.get("task")),
        "seed": [str(run["seed"])] if "seed" in run else [],
        "versions": [f"{name} {version}" for name, version in _items(run.get("versions") or config.get("versions"))],
        "commit of the author's code": _texts(run.get("commit")),
    }
    return markdown(["", ""], [[name, ", ".join(map(escaped, values))] for name, values in rows.items() if values])


def _drawn(table: Table) -> str:
    drawn = markdown([*map(_plain, table.columns)], (map(_plain, line) for line in table.lines), numbers=True)
    return f"**{_plain(table.title)}**\n\n{drawn}"


def _plain(text: str) -> str:
    """Text of itrain's own with names in it, none of which may act."""
    line = _short(text, 3 * LONGEST)
    return re.sub(r"([\\`*_\[\]<>|&~#])", r"\\\1", line)


def _short(text: str, most: int) -> str:
    """A line that shows a stranger's text."""
    line = printable(text)
    return f"{line[:most]}..." if len(line) > most else line


def _fenced(text: str, language: str) -> str:
    lines = "\n".join(printable(line)[: 3 * LONGEST] for line in text.split("\n")).replace("<!--", "< !--")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", lines))])
    return f"{fence}{language}\n{lines}\n{fence}"


def _trusting(trust: Sequence[str]) -> str:
    return f", trust={list(trust)}" if trust else ""


def _figures(metrics: object) -> dict[str, float]:
    """The final figures that are numbers."""
    found = {key: value for key, value in _items(metrics) if isinstance(value, int | float)}
    return {key: float(value) for key, value in list(found.items())[:FIGURES]}


def _called(node: object) -> list[str]:
    """A class of a configuration or of an export, and its plain arguments."""
    if not isinstance(node, Mapping):
        return []
    path = node.get("_target_", node.get("class"))
    given = node.get("arguments", {key: value for key, value in node.items() if not key.startswith("_")})
    plain = [f"{key}={value}" for key, value in _items(given) if isinstance(value, bool | int | float | str)]
    return [str(path), *plain]


def _base_name(config: Mapping[str, Any]) -> str:
    return str(dict(_items(config.get("base_model"))).get("name", "unknown"))


def hub_name(config: Mapping[str, Any]) -> str | None:
    """The base model's name on the hub; None where it is a folder's or one of itrain's own."""
    name, base = _base_name(config), dict(_items(config.get("base_model")))
    is_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) and not base.get("folder")
    return name if is_one and len(name) <= LONGEST and name != "custom" and not name.startswith("itrain/") else None


def _last(path: object) -> str:
    return str(path).rpartition(".")[2]


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [", ".join(f"{key} {part}" for key, part in _items(each)) or str(each) for each in values]


def _items(value: object) -> list[tuple[str, Any]]:
    return [(str(key), each) for key, each in value.items()] if isinstance(value, Mapping) else []


def _parts(text: str) -> tuple[str, str, str]:
    """What stands in a card before, between and after the marks of what a push writes anew."""
    before, begun, rest = text.partition(BEGIN)
    written, ended, after = rest.partition(END)
    if begun and ended:
        return before, written, after
    return f"\n{text.strip()}\n\n" if text.strip() else "\n", "", "\n"


def _between(text: str, begin: str, end: str) -> str:
    """A part of a card with its marks; nothing where it has none."""
    _, begun, rest = text.partition(begin)
    inside, ended, _ = rest.partition(end)
    return f"{begin}{inside}{end}" if begun and ended else ""
