# %% [markdown]
# # 1. Where does a language model keep the gender of a name?
#
# After `Mary walked because` a language model goes on with `she`, after `John walked because` with `he`. Somewhere between
# the name and the pronoun it must carry one bit: the gender. **Where is that bit, and in how many dimensions?**
#
# You will swap activations between two prompts by hand, build a direction by hand, and then let *distributed alignment
# search* (DAS) learn one. The model ships with itrain and has 598,400 parameters. All cells together take about 20 seconds.

# %%
import itrain

model = itrain.load_embedded()
model

# %% [markdown]
# ## Swap by hand
#
# A *base* is the prompt whose run you edit. A *source* is the prompt that a value comes from. A *site* says where: here the
# output of block 2, at the token `Mary`. Swap everything the site holds, and look at the likeliest next tokens.

# %%
site = {"write": 'layer2.block_output@"Mary"', "read": 'layer2.block_output@"John"'}
model.run("Mary walked because", site, source="John walked because")

# %% [markdown]
# The pronoun flips. The whole vector at this token carries the gender, and perhaps much else. Try every layer at every
# token. Each number below is the probability of `he` after the swap.

# %%
import pandas

tokens = {"Mary": 1, "walked": 2, "because": 3}
rows = {}
for layer in range(6):
    swaps = [
        model.run("Mary walked because", f"layer{layer}.block_output@{place}", source="John walked because")
        for place in tokens.values()
    ]
    rows[f"layer {layer}"] = [swap.probability("he").item() for swap in swaps]
by_hand = pandas.DataFrame(rows, index=list(tokens)).T.round(2)
by_hand

# %% [markdown]
# The gender sits at the name in layers 0 to 2, and at the last token from layer 3 on. The verb between them never holds it.
#
# ## A direction by hand
#
# A vector of 80 numbers is a lot for one bit. Take the difference between the mean activations of two groups of names, and
# swap along that direction alone.

# %%
she, he = ["Mary", "Sarah", "Emma", "Lisa"], ["John", "Paul", "David", "James"]
read = {name: model.read(f"{name} walked because", "layer2.block_output@1")[0][0, 0] for name in she + he}
direction = sum(read[name] for name in he) - sum(read[name] for name in she)
direction = direction / direction.norm()


def along(base, source):
    return base + ((source - base) @ direction)[..., None] * direction


# %%
model.run("Mary walked because", "layer2.block_output@1", along, source="John walked because")

# %% [markdown]
# One direction out of 80 does nearly all of it, for one pair of prompts. Two questions remain. Does it hold for names that
# were not looked at? And is there a better direction?
#
# ## Let the trainer find it
#
# `itrain.fit` runs a *recipe*. This one draws pairs of prompts, and labels each with what a *causal model* predicts: the
# base, with the gender of the source. DAS then learns the direction whose swap gives that label. The names of the test are
# not among those of the training.

# %%
fit = itrain.fit("das_gender")

# %% [markdown]
# **Interchange intervention accuracy** (IIA) is the share of held-out pairs where the swap gives the predicted answer. Look
# at the pairs whose label changes: there, doing nothing scores 0.
#
# Two controls stand beside it. A random direction changes nothing. The whole vector does no better than the learned
# direction, so no other dimension is needed.

# %%
fit.picture

# %% [markdown]
# ## Use what was trained
#
# The trained intervention is a plain module. It acts in a one-off run as your own function did.

# %%
(das,) = fit.module.interchange.trained.values()
run = model.run("Mary walked because", "layer2.block_output@1", das, source="John walked because")
run

# %% [markdown]
# How does the learned direction compare with the one made by hand? Here is the cosine between them, without its sign.

# %%
cosine = das.subspace.rows.detach()[0] @ direction
print(f"{cosine.abs():.2f}")

# %% [markdown]
# ## What this notebook shows
#
# - The gender moves from the name to the last token between layers 2 and 3.
# - One learned dimension of 80 carries it on held-out names.
# - A random dimension carries none of it.
#
# The hidden cell below asserts these claims; a test runs it.
#
# **Next.** Change `site=` to `layer4.block_output@last`, or `intervention={"rank": 4}`. Then ask whether a probe would have
# told you the same: [DAS against probes](02_das_and_probes.ipynb). What each figure means is in
# [IIA and its controls](../docs/concepts/iia.md), and what a site may be in [Sites](../docs/concepts/sites.md).

# %% tags=["claims"]
assert by_hand.loc["layer 2", "Mary"] > 0.7 and by_hand.loc["layer 4", "because"] > 0.7
assert by_hand["walked"].max() < 0.1
assert fit.figures["test/iia_changing_argmax"] > 0.95
assert fit.figures["test/random_subspace/iia_changing_argmax"] < 0.05
assert run.top(1)[0][0].text == "he"
