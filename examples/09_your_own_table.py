# %% [markdown]
# # 9. Can you bring your own pairs without writing a task?
#
# A table of pairs is enough: one row says the base, the source, and the answer after the swap. **Where does the model keep
# the city of a landmark?** Write the table, let itrain check it, fit, sweep, and read the report. About 40 seconds.

# %% [markdown]
# ## Write the table
#
# Take any source of pairs. Here they are landmarks that the embedded model knows, in one wording.

# %%
import json
import random
from pathlib import Path

from itrain.tiny_world import LANDMARKS

model_knows = {name: facts["city"] for name, facts in sorted(LANDMARKS.items())}
len(model_knows), list(model_knows.items())[:3]


# %%
def row(base, source, split):
    text = "The {} is in downtown"
    return {
        "base": text.format(base), "source": text.format(source), "split": split,
        "base_spans": {"place": base}, "source_spans": {"place": source},
        "base_label": model_knows[base], "source_label": model_knows[source], "label": model_knows[source],
    }  # fmt: skip


# %% [markdown]
# Keep landmarks apart: those of test pairs occur in no training pair. Then a direction cannot be learned by heart.

# %%
draw, names = random.Random(0), list(model_knows)
draw.shuffle(names)
groups = {"train": (names[:50], 512), "validation": (names[50:60], 64), "test": (names[60:], 128)}
rows = [row(*draw.sample(part, 2), split) for split, (part, number) in groups.items() for _ in range(number)]
rows = list({(each["base"], each["source"]): each for each in rows}.values())
Path("landmarks.jsonl").write_text("\n".join(map(json.dumps, rows)))
len(rows)

# %% [markdown]
# ## Check it before any run
#
# `itrain task check` renders examples as the model sees them: tokens, spans, labels. A wrong row is named with its line.
# This cell calls the command from Python; in a shell it is `itrain task check landmarks.jsonl`.

# %%
from itrain.cli import main

status = main(["task", "check", "landmarks.jsonl"])
# %% [markdown]
# ## Fit
#
# Name the table and a site; `@place` is the span of your column. Pairs that the model
# answers wrongly would be left out: `keep` is `argmax`.

# %%
import itrain

table = {"pairs": "landmarks.jsonl", "keep": "argmax"}
fit = itrain.fit("das_gender", site="layer4.block_output@last", data=table, intervention={"rank": 16}, name="landmarks")

# %%
fit.picture

# %% [markdown]
# ## Sweep
#
# Where else does the swap work? Try every layer at the landmark's last word and at the last token.

# %%
grid = {"layers": "all", "positions": ["place.last", "last"], "methods": ["das", "full_vector"], "ranks": [16]}
sweep = itrain.sweep("das_gender", data=table, name="landmarks", sweep={**grid, "random_model": False})

# %%
sweep.picture

# %% [markdown]
# At the last word alone even the whole vector does little: the lookup needs both words, as
# [causal tracing](07_causal_tracing.ipynb) shows. At the last token of the upper layers the whole vector moves the city. The
# subspace of 16 dimensions does most of it, on landmarks that it has not seen, and not all.
#
# ## The report
#
# The sweep has left one page with maps, curves and a table in which each row names the command that repeats it.

# %%
best = sweep.table.sort_values("iia_changing_argmax").iloc[-1]
print(sweep.report.name, f"{sweep.report.stat().st_size / 1000:.0f} kB")
print(best["command"])

# %% [markdown]
# ## What this notebook shows
#
# - A JSONL file of pairs is a task: spans, labels and splits are columns.
# - The city is at the last token of the upper layers, and not at the last word alone.
# - 16 of 80 dimensions move most of 53 cities; the whole vector says what there is to find.
#
# **Next.** Give each rank its own fit: `sweep={"ranks": [4, 16, 64]}`. All columns are in
# [Your own data](../docs/howto/data.md); a task with a causal model in YAML is in [Tasks](../docs/howto/tasks.md).

# %% tags=["claims"]
cells = sweep.table.set_index(["method", "position", "layer"])["iia_changing_argmax"]
assert cells["full_vector", "last", 5] > 0.9 and cells["full_vector", "last", 0] < 0.1
assert cells[:, "place.last", :].max() < 0.5
assert fit.figures["test/iia_changing_argmax"] > fit.figures["test/random_subspace/iia_changing_argmax"] + 0.2
