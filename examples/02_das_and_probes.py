# %% [markdown]
# # 2. Does a probe tell where a variable is used?
#
# A *probe* reads a variable from activations: if a linear classifier can tell the gender at some token, the gender is
# there. But **does the model use what a probe finds?** To know, swap it and look at the answer.
#
# You will train probes and DAS at every layer and every token, and lay the two maps side by side. About 40 seconds.

# %%
import itrain

small = {"train_pairs": 512, "test_pairs": 128}

# %% [markdown]
# ## Both methods, all sites
#
# `itrain.sweep` fits a grid. Without `layers` and `positions` it would take those of the recipe; here they are all six
# layers and all four tokens of `<|endoftext|> Mary walked because`. The sweep also fits controls, and prints what it finds.

# %%
sweep = itrain.sweep(
    "das_vs_probe_gender",
    sweep={"methods": ["das", "probing", "random_subspace"], "random_model": False},
    data=small,
)

# %% [markdown]
# ## The maps side by side
#
# Layers go up, tokens go right. On the left is the share of label-changing pairs that DAS answers as the causal model
# predicts. Beside it is the accuracy of the probes, for which 0.5 is chance.

# %%
sweep.picture

# %% [markdown]
# DAS marks one path: the name in layers 0 to 2, then the last token from layer 3 on. The probe reads the gender there too,
# and nearly everywhere else. At the verb, in the upper layers, it is almost always right.
#
# ## Look closer at the verb

# %%
table = sweep.table.set_index(["method", "position", "layer"]).sort_index()
verb = {
    "probe accuracy": table.loc[("probing", "verb"), "probe_accuracy"],
    "DAS, label-changing pairs": table.loc[("das", "verb"), "iia_changing_argmax"],
}
import pandas

pandas.DataFrame(verb).round(2)

# %% [markdown]
# The information is at the verb, and the answer does not depend on it. Attention copies a name's features to the tokens
# after it, whether anything reads them or not.
#
# ## Does a control for probes help?
#
# *Selectivity* is the usual control: the probe's accuracy less that of a probe of random labels for the names. If it told
# what the model uses, it would be high on the path and low beside it.

# %%
probes = sweep.table[sweep.table["method"] == "probing"].set_index(["layer", "position"])
used = {(layer, "name") for layer in range(3)} | {(layer, "connective") for layer in range(3, 6)}
on_path = probes.index.isin(used)
readable = probes["probe_accuracy"] > 0.9
selectivity = {
    "on the path": probes["selectivity"][on_path].mean(),
    "beside it, where the gender can be read": probes["selectivity"][~on_path & readable].mean(),
}
selectivity

# %% [markdown]
# It is as high beside the path as on it. Selectivity says that a probe has learned something general; it does not say that
# the model uses it.
#
# ## Swap what the probe reads
#
# The most direct check takes the probe's own site. Fit DAS at the verb in layer 4 with more room, 16 dimensions.

# %%
site = "layer4.block_output@verb"
fit = itrain.fit("das_gender", site=site, task={"templates": "simple"}, intervention={"rank": 16}, data=small)

# %% [markdown]
# Even 16 dimensions change no answer there, and neither does the whole vector. No direction at this site can be the one the
# model uses.
#
# ## What this notebook shows
#
# - A probe finds the gender at sites whose swap changes nothing.
# - DAS marks the sites that the answer depends on.
# - Selectivity does not tell the two apart here.
#
# **Next.** Add `"mean_difference"` or `"full_vector"` to the methods. Open `sweep.report` in a browser: each cell shows its
# figures and the command that repeats it. Then see what DAS says of [a variable that is not there](03_not_there.ipynb).
# The controls are explained in [Checks](../docs/concepts/checks.md).

# %% tags=["claims"]
assert table.loc[("das", "name", 1), "iia_changing_argmax"] > 0.9
assert table.loc[("das", "connective", 4), "iia_changing_argmax"] > 0.9
assert table.loc[("probing", "verb", 4), "probe_accuracy"] > 0.9
assert table.loc[("das", "verb", 4), "iia_changing_argmax"] < 0.1
assert fit.figures["test/iia_changing_argmax"] < 0.1 and fit.figures["test/full_vector/iia_changing_argmax"] < 0.1
assert selectivity["beside it, where the gender can be read"] > selectivity["on the path"] - 0.1
