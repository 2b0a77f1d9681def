"""Completion in a shell: verbs, recipes, choices, keys after a dot, and values, without Hydra and torch.

Hydra's own completion knows one program with one configuration: no verbs, no recipes from two folders and no
arguments of constructors, and it imports all of Hydra at each press of a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from itrain import shipped
from itrain.help import VERBS
from itrain.sources import Argument, classes_of, source_of

SHELLS = ("bash", "zsh", "fish")
CONFIGURED = ("fit", "plan", "sweep", "test", "export", "describe", "generate", "run", "task", "show", "explain")
FILES = ("ckpt", "export", "output", "resume", "prompts", "data.pairs", "model.name")
"""Keys whose values are files, which the shell completes."""
OWN = {
    "sweep": ("sweep.methods=", "sweep.layers=", "sweep.positions=", "sweep.components=", "sweep.seeds=", "resume="),
    "run": ("site=", "read=", "base=", "source=", "dims=", "fit=", "top=", "strength="),
    "generate": ("export=", "prompt=", "prompts=", "source=", "acts=", "strength=", "max_new_tokens="),
    "explain": ("base=",),
    "export": ("to=", "repo=", "private=", "branch=", "merge="),
    "plan": ("rate=",),
    "describe": ("top=",),
    "reproduce": ("quick", "--list", "rows=", "output="),
}
TOP = ("recipe=", "site=", "seed=", "name=", "output=", "threads=", "ckpt=", "export=")
_BASH = """\
_itrain() {
    # Words as the shell would read them, without quotes; cut is what readline takes for an earlier word.
    local line="${COMP_LINE:0:COMP_POINT}" quote="" cut="" char each found i n=0
    local -a words=("")
    for ((i = 0; i < ${#line}; i++)); do
        char="${line:i:1}"
        if [[ "$char" == "\\\\" && "$quote" != "'" ]]; then
            i=$((i + 1))
            words[n]+="${line:i:1}"
        elif [[ -n "$quote" ]]; then
            if [[ "$char" == "$quote" ]]; then quote=""; else words[n]+="$char"; fi
        elif [[ "$char" == [\\"\\'] ]]; then
            quote="$char" cut="${words[n]}"
        elif [[ "$char" == " " ]]; then
            if [[ -n "${words[n]}" ]]; then n=$((n + 1)) cut=""; words[n]=""; fi
        else
            words[n]+="$char"
            [[ "$char" == [=:] ]] && cut="${words[n]}"
        fi
    done
    found="$(itrain --complete "${words[@]:1}" 2>/dev/null)"
    if [[ "$found" == "<files>" ]]; then
        compopt -o filenames 2>/dev/null
        local key="" word="${words[n]}"
        [[ "$word" == *=* ]] && key="${word%%=*}="
        found="$(compgen -f -- "${word#"$key"}" | while IFS= read -r each; do printf '%s\\n' "$key$each"; done)"
    fi
    COMPREPLY=()
    while IFS= read -r each; do
        [[ -n "$each" ]] && COMPREPLY+=("${each#"$cut"}")
    done <<< "$found"
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _itrain itrain
"""
_ZSH = """\
#compdef itrain
_itrain() {
    local -a found
    found=("${(@f)$(itrain --complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ "$found" == "<files>" ]]; then
        compset -P '*='
        _files
    else
        compadd -S '' -- $found
    fi
}
compdef _itrain itrain
"""
_FISH = """\
function __itrain
    set -l words (commandline -opc) (commandline -ct)
    set -l found (itrain --complete $words[2..-1] 2>/dev/null)
    if test "$found" = "<files>"
        __fish_complete_path (commandline -ct)
    else
        string join \\n $found
    end
end
complete -c itrain -f -a '(__itrain)'
"""


def script(words: Sequence[str]) -> str:
    """The script that the shell that is asked for reads.

    Raises:
        ConfigError: there is no such shell, or several are named.
    """
    from itrain.signatures import ConfigError

    if len(words) != 1 or words[0] not in SHELLS:
        raise ConfigError(f"'completion' takes one shell: {', '.join(SHELLS)}")
    return {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[words[0]]


def candidates(words: Sequence[str]) -> list[str]:
    """What the last word may become; ``<files>`` alone where the shell knows better."""
    *before, last = words or [""]
    if not before:
        return _starting(last, [*VERBS, "--help", "--version"])
    verb = before[0]
    key, equals, _ = last.partition("=")
    if equals and key in FILES:
        return ["<files>"]
    if verb == "completion":
        return _starting(last, SHELLS)
    if verb == "list":
        families = [f"{each}s" for each in (*shipped.FAMILIES, "component", "position")]
        return _starting(last, ["recipes", *shipped.group_files(), *families])
    if verb == "reproduce":
        return _starting(last, [*OWN[verb], *(file.stem for file in shipped.shipped_rows())])
    if verb in ("report", "dashboard"):
        return ["<files>"]
    if verb not in CONFIGURED:
        return []
    if before == ["task", "check"] and not equals:
        return ["<files>"]
    if equals:
        found = _starting(last, (f"{key}={each}" for each in _values(key, before[1:])))
        return found or (["<files>"] if key == "recipe" else [])
    names = [*TOP, *OWN.get(verb, ()), *shipped.group_files(), *(["check"] if verb == "task" else []), "--help"]
    keyed = [f"{each}=" if each in shipped.group_files() else each for each in names]
    explained = _explained() if before == ["explain"] else ()
    return _starting(last, [*keyed, *explained, *(_keys(last, before[1:]) if "." in last else ())])


def _starting(word: str, names: Sequence[str] | Iterator[str]) -> list[str]:
    return [each for each in dict.fromkeys(names) if each.startswith(word)]


def _explained() -> Iterator[str]:
    """Names that 'explain' knows: recipes, choices, components and classes."""
    yield from shipped.recipe_files()
    for choices in shipped.group_files().values():
        yield from choices
    yield from shipped.components()
    for package in {"itrain.interventions", *(home for home, _ in shipped.FAMILIES.values())}:
        yield from (each.path.rpartition(".")[2] for each in classes_of(package))


def _values(key: str, words: Sequence[str]) -> Iterator[str]:
    groups = shipped.group_files()
    if key == "recipe":
        yield from sorted(shipped.recipe_files())
    elif key in groups:
        yield from groups[key]
    elif "." in key:
        place, _, name = key.rpartition(".")
        argument = _arguments(place, words).get(name)
        annotation = argument.annotation if argument else ""
        yield from re.findall(r"'([\w.-]+)'", annotation if "Literal" in annotation else "")
        yield from ("true", "false") if re.search(r"\bbool\b", annotation) else ()


def _keys(last: str, words: Sequence[str]) -> Iterator[str]:
    """The keys of the part before the last dot, as the words so far choose it."""
    place = last.rpartition(".")[0]
    node = _node(place, words)
    for name, argument in _arguments(place, words).items():
        if name in node or argument.default is not None:
            yield f"{place}.{name}{'.' if isinstance(node.get(name), Mapping) else '='}"


def _arguments(place: str, words: Sequence[str]) -> dict[str, Argument]:
    source = source_of(str(_node(place, words).get("_target_", "")))
    return {each.name: each for each in source.arguments} if source else {}


def _node(place: str, words: Sequence[str]) -> Mapping[str, Any]:
    """What the chosen files and the words say at a place of the configuration."""
    part, *rest = place.split(".")
    found = shipped.chosen(words)
    node: Any = shipped.choice(part, found.choices.get(part, ""))
    above = found.settings.get(part)
    node = {**node, **above} if isinstance(above, Mapping) else node
    for name in rest:
        node = node.get(name) if isinstance(node, Mapping) else None
    target = next((word.split("=", 1)[1] for word in words if word.startswith(f"{place}._target_=")), None)
    node = node if isinstance(node, Mapping) else {}
    return {**node, "_target_": target} if target else node
