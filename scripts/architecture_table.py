"""Writes the page of architectures: what each row of the table of architectures has, as tried on a tiny random model.

    python scripts/architecture_table.py                  # try all rows, and write the page
    python scripts/architecture_table.py --only llama t5  # try these, and leave the other rows as they are written
    python scripts/architecture_table.py --check          # write nothing; exit 1 where the page is not up to date

A release of transformers stays in the page beside a later one as long as what the row says stays the same.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import transformers
from packaging.version import Version
from row_trial import replay_of, try_row

from itrain.architectures import ARCHITECTURES, Architecture
from itrain.files import write_text
from itrain.sites import ATTENTION_WEIGHTS

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
COMMAND = "python scripts/architecture_table.py"
STREAM = ("block_input", "block_output")
ATTENTION = (
    *("attention_input", "query_output", "key_output", "value_output"),
    *("attention_value_output", "attention_output"),
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "stream": STREAM,
    "attention": ATTENTION,
    "weights": (ATTENTION_WEIGHTS,),
    "cross-attention": tuple(f"cross_{name}" for name in ATTENTION),
    "mlp": ("mlp_input", "mlp_activation", "mlp_output"),
    "mixture": ("router_output", "expert_output"),
    "mixer": ("mixer_input", "mixer_activation", "mixer_output"),
}
"""Components that mostly come together, by the name of the group; a row that lacks half of them has not the group."""
NONE = "-"
HEADER = "| model_type | components | replay | transformers |"


class Line(NamedTuple):
    """A line of the table: the cells of a row."""

    model_type: str
    components: str
    replay: str = NONE
    releases: str = NONE

    def __str__(self) -> str:
        return f"| {' | '.join([f'`{self.model_type}`', *self[1:]])} |"


def names_of(row: Architecture) -> list[str]:
    """The row's components, and attention weights where they can be had."""
    found = list(row.components)
    for stack in [f"{each}." for each in row.stacks] or [""]:
        if row.weights and f"{stack}attention_input" in found:
            found.append(f"{stack}{ATTENTION_WEIGHTS}")
    return found


def in_groups(names: Iterable[str]) -> str:
    """Components of a row as a cell: groups, what of a group is lacking, and what is in none."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        stack, _, component = name.rpartition(".")
        stacks.setdefault(stack, []).append(component)
    cells = [f"**{stack}**: {_grouped(found)}" if stack else _grouped(found) for stack, found in stacks.items()]
    return "; ".join(cells)


def _grouped(names: Sequence[str]) -> str:
    said, left = [], list(names)
    for group, members in GROUPS.items():
        lacking = [name for name in members if name not in names]
        if 2 * len(lacking) < len(members):
            said.append(group + (f" without {' and '.join(f'`{name}`' for name in lacking)}" if lacking else ""))
            left = [name for name in left if name not in members]
    return ", ".join([*said, *(f"`{name}`" for name in left)])


def glossary() -> list[str]:
    """What each component means, and how a row's other fields are read: from the docstring of Architecture."""
    text = inspect.getdoc(Architecture) or ""
    _, start, rest = text.partition("components: by name")
    if not start:
        raise ValueError("the docstring of Architecture has no 'components: by name'")
    lines = inspect.cleandoc(rest.partition("\n\n")[2]).splitlines()
    joined: list[str] = []
    for line in map(str.strip, lines):
        if line.startswith("* ") or not line or not joined or not joined[-1]:
            joined.append(line.replace("* ", "- ", 1) if line.startswith("* ") else line)
        else:
            joined[-1] += f" {line}"
    return [line.replace("``", "`") for line in joined]


def written(page: Path = PAGE) -> dict[str, Line]:
    """The lines of the page's table."""
    text = page.read_text() if page.is_file() else ""
    _, _, table = text.partition(f"{HEADER}\n")
    lines = {}
    for line in table.partition("\n\n")[0].splitlines()[1:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        lines[name.strip("`")] = Line(name.strip("`"), *cells)
    return lines


def tried(model_type: str, before: Line | None) -> Line:
    """The row's line, tried on a tiny model where the installed transformers has one, else as it was."""
    plain = Line(model_type, in_groups(names_of(ARCHITECTURES[model_type])))
    fault = try_row(model_type)
    if fault is not None:
        print(f"{model_type}: not tried with transformers {transformers.__version__}: {fault}", flush=True)
        same = before is not None and before.components == plain.components
        return before if before is not None and same else plain
    line = plain._replace(replay=replay_of(model_type))
    found = {transformers.__version__}
    if before is not None and before[:3] == line[:3] and before.releases != NONE:
        found |= set(before.releases.split(", "))
    return line._replace(releases=", ".join(sorted(found, key=Version)))


def page_of(lines: Mapping[str, Line]) -> str:
    """The whole page."""
    legend = [f"    - **{group}**: {', '.join(f'`{name}`' for name in members)}" for group, members in GROUPS.items()]
    table = [HEADER, "| --- | --- | --- | --- |", *(str(lines[name]) for name in sorted(lines))]
    return HEAD.format(
        command=COMMAND, glossary="\n".join(glossary()), legend="\n".join(legend), table="\n".join(table)
    )


HEAD = """# Architectures

<!-- Written by `{command}`. Change that script or the rows in itrain/architectures, not this page. -->

A site names a layer and a component: `layer5.mlp_output@last`. Which components there are depends on the model's
architecture, which itrain finds by the `model_type` of the model's configuration. This page lists the architectures
that itrain knows, what each component means, and how replay runs each of them. `module:<path>.input` and
`module:<path>.output` name any module of any model, whether it has a row or not.

```sh
itrain explain layer2.mlp_output@last  # and model=<choice>, or model=hf model.name=<folder or name>
itrain list components
```

## Which models

| you know it as | `model_type` |
| --- | --- |
| GPT-2; Pythia, GPT-NeoX; GPT-J; OPT; BLOOM | `gpt2`; `gpt_neox`; `gptj`; `opt`; `bloom` |
| Llama 1 to 3, and models that took its shape; Llama 4 | `llama`; `llama4_text` |
| Mistral; Mixtral; Ministral | `mistral`; `mixtral`; `ministral` |
| Qwen 2 to 2.5; Qwen 3; Qwen 3.5 | `qwen2`; `qwen3`, `qwen3_moe`; `qwen3_5_text` |
| Gemma 1 to 4 | `gemma`; `gemma2`; `gemma3_text`; `gemma4_text` |
| Phi; OLMo; Falcon; StableLM; SmolLM3 | `phi`, `phi3`; `olmo2`, `olmo3`; `falcon`; `stablelm`; `smollm3` |
| DeepSeek; GPT-OSS; GLM; Cohere; Granite | `deepseek_v3`; `gpt_oss`; `glm4`; `cohere2`; `granite` |
| Mamba | `mamba`, `mamba2`, `falcon_mamba` |
| BERT, RoBERTa, ModernBERT | `bert`, `roberta`, `modernbert` |
| T5, BART | `t5`, `bart` |
| ViT, DINO, CLIP, SigLIP; Whisper, wav2vec 2.0 | `vit`, `dinov2`, `clip`, `siglip`; `whisper`, `wav2vec2` |

`AutoConfig.from_pretrained(name).model_type` says what a model of yours is. Sizes are read from the model, so that
all sizes of a type work. The table was made without the weights of these models: each row was tried on a tiny model
with random weights.

## The table

What the cells mean stands [below it](#how-to-read-the-table).

{table}

Tried by `{command}`, which builds a model of two or three blocks with random weights for each row.

## How to read the table

- **components** are written in groups:
{legend}

    "without" names what a row lacks of a group, and what follows the groups is had besides. Some blocks may lack a
    component that others have, as in models that mix kinds of blocks; an error then names the layers that have it.

- **replay** says how much of a run is skipped when the output of the first block is edited at the last token, as told
  by the network itself (`replay=auto`). *suffix*: the blocks below, and the tokens before the edited one. *prefix*:
  the blocks below. *none*: nothing, the model runs under plain hooks. The reason follows where less than the most is
  skipped. It is that of a tiny model with the usual settings: a model's own settings, its inputs and the edited sites
  may allow less, which `itrain show` tells.
- **transformers** lists the releases with which the row was tried on a tiny random model: the outputs of the blocks
  equal the hidden states that transformers returns, an edit of a block equals the same edit by a hook written by
  hand, each component has the size that it is said to have and changes the answer when it is changed, attention
  weights equal those that transformers returns, and replay equals hooks. A dash means that no
  release was tried by the script; towers of images and sound are tried by `tests/test_towers.py`.
  A release that other rows list and this one does not has no such model, or cannot run it on text.

## What the components mean

{glossary}

## How sites look

- **A decoder or an encoder alone**: `layer0.block_output@last`. Layers count from 0. One attention head is
  `layer0.attention_value_output.head3@last`; grouped keys and values have fewer heads than queries.
- **Several stacks of blocks**, as an encoder and a decoder: the stack comes first, `encoder.layer0.block_output@last`
  and `decoder.layer2.cross_attention_output@last`, and layers count in each stack from 0. In settings that take a
  component without a layer, write `encoder.block_output`. Positions count the tokens of the stack's own text.
- **Mixtures of experts**: `layer3.router_output@last` holds one logit for each expert, before the choice, so that an
  edit changes which experts are chosen. `layer3.expert_output@last` is what the chosen experts give together. A
  single expert's output is no site: the experts are one fused module, which sees the tokens sorted by expert.
- **State-space and linear-attention blocks**: `layer0.mixer_output@last` joins the residual stream as
  `attention_output` does elsewhere. The state itself is no module's input or output and no site. An edit of a token
  reaches later tokens through the state, so replay runs all tokens of the blocks above.
- **Attention weights**: `layer0.attention_weights.head2@last` holds the weights that the last token gives to all
  tokens. Load the model with `attn_implementation="eager"`.

## Your own rows

A model without a row gets one as plain data: for one recipe, whose exports carry it, or for the process.

<!-- not run: the part of a recipe that describes a model of your own -->
```yaml
model:
  name: my/model
  components:
    blocks: transformer.h        # as print(model) shows it
    causal: true
    components:                  # block_input and block_output are always there
      mlp_output: {{path: mlp.down, end: output}}
      attention_value_output: {{path: attn.proj, end: input, heads: whole}}
      query_output: {{path: attn.qkv, end: output, heads: side_by_side, part: query}}
```

In Python, `itrain.register_architecture("my_type", {{"blocks": ..., "causal": True, "components": {{...}}}})` does it
for all models of a `model_type`, and a class in place of the name for modules of your own.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(ARCHITECTURES), metavar="model_type", help="try these rows")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is not up to date")
    arguments = parser.parse_args()
    before = written()
    lines = {}
    for name in sorted(ARCHITECTURES):
        chosen = arguments.only is None or name in arguments.only
        lines[name] = tried(name, before.get(name)) if chosen or name not in before else before[name]
    if not arguments.check:
        write_text(PAGE, page_of(lines))
        print(f"wrote {PAGE}")
        return 0
    changed = differences(page_of(lines), PAGE.read_text() if PAGE.is_file() else "")
    for line in changed:
        print(line)
    if changed:
        print(f"{PAGE} is not up to date; run {COMMAND}")
    return int(bool(changed))


def differences(new: str, old: str) -> list[str]:
    """Lines that one page has and the other has not, whatever releases a row was tried with."""
    new_lines, old_lines = (
        [re.sub(r"^(\| `.*\|)[^|]*\|$", r"\1", line) for line in text.splitlines()] for text in (new, old)
    )
    lacking = [f"+ {line}" for line in new_lines if line not in old_lines]
    extra = [f"- {line}" for line in old_lines if line not in new_lines]
    return [*lacking, *extra]


if __name__ == "__main__":
    sys.exit(main())
