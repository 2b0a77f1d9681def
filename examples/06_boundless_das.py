# %% [markdown]
# # 6. How many dimensions does a variable need?
#
# DAS asks you for a rank. *Boundless DAS* learns it: it starts with a large part of the space and pays for each dimension that it
# swaps. **How large is the subspace of "the price is not above the upper bound"?** And is it the right size?
#
# The model answers `Say yes if it costs between 3 and 9 dollars . It costs 5 dollars .` with `Yes` or `No`. You will watch
# the boundary shrink, and compare with fixed ranks. About 45 seconds.

# %%
import itrain

model = itrain.load_embedded()
question = "Say yes if it costs between 3 and 7 dollars . It costs {} dollars ."
{price: model.run(question.format(price)).top(1)[0][0].text for price in (1, 3, 5, 7, 9)}

# %% [markdown]
# ## Fit
#
# The causal model has two variables: `above`, the price is at least the lower bound, and `below`, it is at most the upper
# one. The answer is yes if both hold. The recipe interchanges `below` at the price's token in layer 2.

# %%
boundless = itrain.fit("boundless_das_price")

# %% [markdown]
# ## Watch the boundary
#
# After each epoch the gates are made hard, and those that are open are counted. The curve below has the size of the subspace
# and the accuracy on validation pairs.

# %%
epochs = boundless.curves.dropna(subset=["validation/rank"]).set_index("epoch")
axes = epochs[["validation/rank"]].plot(figsize=(7, 3.2), marker="o", ylabel="dimensions swapped, of 80", ylim=(0, 85))
axes = epochs["validation/iia_argmax"].plot(ax=axes, secondary_y=True, marker="s", legend=True, ylim=(0, 1.05))
# %% [markdown]
# In numbers, epoch by epoch:

# %%
sizes = epochs["validation/rank"].astype(int).tolist()
sizes

# %% [markdown]
# The boundary falls from half of the space to a quarter of it, and the accuracy rises on the way. With all 80 dimensions the
# swap also carries what it should not: the whole vector takes `above` along with `below`.

# %%
boundless.picture

# %% [markdown]
# ## Is it the right size?
#
# Fit DAS at fixed ranks and compare. The same pairs, the same site, the same number of epochs.

# %%
ranks = itrain.sweep(
    "das_price",
    sweep={"layers": [2], "positions": ["price"], "methods": ["das"], "ranks": [1, 4, 16, 48], "random_model": False},
)

# %%
by_rank = ranks.table.set_index("rank")["iia_argmax"]
axes = by_rank.plot(figsize=(7, 3.2), marker="o", ylabel="IIA on held-out pairs", ylim=(0.5, 1), logx=True)
axes.plot(
    boundless.figures["test/rank"], boundless.figures["test/iia_argmax"], "r*", markersize=14, label="Boundless DAS"
)
axes.axhline(boundless.figures["test/full_vector/iia_argmax"], color="grey", linestyle=":", label="whole vector")
legend = axes.legend()
# %% [markdown]
# One dimension is not enough. From a few on, more of them add little. Boundless DAS lands there without being told, at one
# fit instead of four. It is no better than the best fixed rank, and not the smallest one that would do.
#
# ## What this notebook shows
#
# - The boundary shrinks from 43 dimensions after one epoch to 18.
# - The subspace found beats the whole vector, and matches the best fixed ranks.
# - A random subspace of the same rank does little.
#
# **Next.** Change the price of a dimension: `intervention={"boundary_weight": 3}`. A temperature that falls too fast freezes
# the boundary early; see `temperature` in [Methods](../docs/reference/methods.md). For the figures, see
# [Checks](../docs/concepts/checks.md).

# %% tags=["claims"]
assert sizes[0] > 2 * sizes[-1] and sizes[-1] < 40 and abs(boundless.figures["test/rank"] - sizes[-1]) <= 2
assert boundless.figures["test/iia_argmax"] > boundless.figures["test/full_vector/iia_argmax"] + 0.05
assert boundless.figures["test/iia_argmax"] > by_rank.max() - 0.05
assert boundless.figures["test/random_subspace/iia_argmax"] < 0.7
