# %% [markdown]
# # 3. How do you notice that a variable is not there?
#
# A method that always finds something finds nothing. **When you ask for a variable that a network does not have, do the
# figures say so?** And can a search of enough freedom fool you?
#
# You will ask a small network about a right and a wrong causal model, and then watch IIA rise without a cause. About 60
# seconds.

# %%
import itrain

data = {"train_pairs": 8192, "validation_pairs": 1024, "test_pairs": 4096}
model = {"steps": 3000}
trainer = {"max_epochs": 8}

# %% [markdown]
# ## A network and two hypotheses
#
# The network sees four objects w, x, y, z, and says whether w = x and y = z agree. It learns this in a few seconds when it
# is asked for. The right hypothesis: it computes `left` (w = x) and `right` (y = z) first.

# %%
right = itrain.fit("das_hierarchical_equality", model=model, data=data, trainer=trainer)

# %% [markdown]
# Both equalities are there, in the first hidden layer. IIA is near 1 for each and for both at once, and a random rotation
# stays far below.
#
# Now a wrong hypothesis: the network hands on *which object* w is, as a variable of its own. Everything else is the same,
# and the search may use half of all dimensions.

# %%
wrong = itrain.fit("das_hierarchical_equality", model=model, data=data, trainer=trainer,
                   task={"hypothesis": "first_argument"}, intervention={"blocks": 32})  # fmt: skip

# %%
wrong.picture

# %% [markdown]
# ## Read the right column
#
# The mean over all pairs looks better than it is. Pairs whose label does not change are easy: an edit that does nothing gets
# them right. The label-changing pairs tell the hypotheses apart, and the controls say what no search would have reached.

# %%
import pandas

columns = {"all": "iia_argmax", "changing": "iia_changing_argmax", "preserving": "iia_preserving_argmax"}
places = {"trained": "test/", "random subspace": "test/random_subspace/", "whole vector": "test/full_vector/"}
rows = {}
for name, fit in {"right": right, "wrong": wrong}.items():
    for title, place in places.items():
        rows[f"{name}, {title}"] = {column: fit.figures.get(place + key) for column, key in columns.items()}
pandas.DataFrame(rows).T.round(2)

# %% [markdown]
# ## The whole vector is not a subspace
#
# Swapping everything a site holds is the loosest search there is. At the entrance of a language model it always "works" at
# the token that differs, since it swaps the input itself. Here are the whole vector and a subspace, at the name in layer 0
# and one token further.

# %%
small = {"train_pairs": 256, "test_pairs": 128}
sites = ["layer0.block_output@name", "layer0.block_output@verb"]
gender = {site: itrain.fit("das_gender", site=site, data=small, trainer={"max_epochs": 6}) for site in sites}
{site: fit.figures["test/full_vector/iia_changing_argmax"] for site, fit in gender.items()}

# %% [markdown]
# At the verb even the whole vector does nothing: the variable is not there, whatever its form. If the whole vector does
# nothing, no subspace of it should. If a subspace *beats* the whole vector, look for an illusion.
#
# ## Inflation: few pairs, many dimensions
#
# A large subspace and few pairs let a search fit its training pairs and nothing else. Take the wrong hypothesis once more, with
# 64 training pairs, and compare the training pairs with new ones.

# %%
few = {"train_pairs": 64, "validation_pairs": 1024, "test_pairs": 4096, "batch_size": 64}
by_heart = itrain.fit("das_hierarchical_equality", model=model, data=few, trainer={"max_epochs": 150},
                      task={"hypothesis": "first_argument"}, intervention={"blocks": 32})  # fmt: skip
loss = by_heart.curves["train/loss"].dropna()
held_out = by_heart.figures["test/iia_argmax"]
print(f"training loss {loss.iloc[0]:.2f} -> {loss.iloc[-1]:.2f}, IIA on new pairs {held_out:.2f}")

# %%
by_heart.picture

# %% [markdown]
# The training loss falls and the figure on held-out pairs does not follow. Always read IIA on pairs that training has not
# seen; itrain reports no other.
#
# ## What this notebook shows
#
# - The right hypothesis reaches an IIA near 1, the wrong one stays near chance.
# - Label-changing pairs and controls say it plainly; the mean of all pairs hides it.
# - A search with few pairs fits them and says nothing about new ones.
#
# **Next.** A map that is not linear can align almost anything: `recipe=revnet_hierarchical_equality` says when it is vacuous.
# [Checks](../docs/concepts/checks.md) shows an illusion and how the row part gives it away.

# %% tags=["claims"]
assert right.figures["test/iia_argmax"] > 0.9
assert wrong.figures["test/iia_argmax"] < 0.7
assert right.figures["test/random_subspace/iia_argmax"] < 0.75
assert gender[sites[0]].figures["test/full_vector/iia_changing_argmax"] > 0.9
assert gender[sites[1]].figures["test/full_vector/iia_changing_argmax"] < 0.1
assert loss.iloc[-1] < loss.iloc[0] - 0.2 and held_out < 0.7
