# %% [markdown]
# # 7. Where is a fact looked up?
#
# `The Space Needle is in downtown` goes on with `Seattle`. **Where in the network does the landmark become the city, and where is the
# city moved to the end?**
#
# *Causal tracing* answers by breaking the run and mending one site at a time.
#
# You will corrupt a prompt by hand, restore one site, and then trace all sites. Nothing is trained. About 20 seconds.

# %%
import itrain

model = itrain.load_embedded()
prompt = "The Space Needle is in downtown"
model.run(prompt).top(1)

# %% [markdown]
# ## Break it
#
# Add noise to the two words of the landmark as they enter the network. The city is lost.

# %%
noise = itrain.Noise.of(deviation=3)
broken = model.run(prompt, 'layer0.block_input@"Space Needle"', noise)
broken

# %% [markdown]
# ## Mend one site
#
# A run may be the source of another. Here the base is the clean prompt, and one site is taken from the broken run: the
# reverse of mending, *breaking* one site. If the city survives, the site is not needed.

# %%
sites = {"landmark, layer 1": 'layer1.block_output@"Space Needle"', "landmark, layer 5": 'layer5.block_output@"Space Needle"',
         "last token, layer 1": "layer1.block_output@last", "last token, layer 5": "layer5.block_output@last"}  # fmt: skip
kept = {name: model.run(prompt, site, source=broken).probability("Seattle").item() for name, site in sites.items()}
{name: round(value, 2) for name, value in kept.items()}

# %% [markdown]
# Early the landmark's tokens matter, late the last token does. One prompt is an anecdote; trace many.
#
# ## Trace all sites
#
# The recipe draws landmarks that the model answers rightly, corrupts both words with noise of three standard deviations, and
# restores one site from the clean run. It does so for outputs of blocks, MLPs and attention. For MLPs and attention, three
# neighbouring layers are restored together, since one alone does little.

# %%
sweep = itrain.sweep("trace_landmarks", sweep={"components": ["block_output", "mlp_output", "attention_output"]})

# %% [markdown]
# ## The picture
#
# Each cell is the mean probability of the right city when this site alone is restored. Without any restoring it is about
# 0.07, in the clean run about 0.96.

# %%
sweep.picture

# %% [markdown]
# Three things stand out.
#
# - **The lookup.** Restoring both words in the lowest layers brings the city back. It takes the lowest MLPs (middle map).
# - **Both words.** One word alone brings back about a third. Neither names the landmark by itself.
# - **The move.** From layer 3 on the last token suffices, and attention brought it there (right map).
#
# ## What this notebook shows

# %%
table = sweep.table.set_index(["component", "position", "layer"])["answer_probability"]
claims = {
    "both words, layer 1": table["block_output", "entity", 1],
    "one word, layer 1": table["block_output", "entity.last", 1],
    "last token, layer 1": table["block_output", "last", 1],
    "last token, layer 4": table["block_output", "last", 4],
    "attention to the last token, layers 2 to 4": table["attention_output", "last", 3],
    "MLPs at the last token, layers 2 to 4": table["mlp_output", "last", 3],
}
{name: round(value, 2) for name, value in claims.items()}

# %% [markdown]
# Tracing shows where restoring suffices. It does not show *how* the city is represented there: for that, fit DAS at these
# sites.
#
# **Next.** `itrain.sweep("trace_landmarks", training="alignment")` swaps landmarks instead of adding noise; the same
# cells stand out. What a site can be is in [Sites](../docs/concepts/sites.md), and one-off edits in
# [One-off runs](../docs/howto/notebook.md).

# %% tags=["claims"]
assert claims["both words, layer 1"] > 0.85 and claims["one word, layer 1"] < 0.5
assert claims["last token, layer 1"] < 0.2 < 0.7 < claims["last token, layer 4"]
assert (
    claims["attention to the last token, layers 2 to 4"] > 0.7 > 0.3 > claims["MLPs at the last token, layers 2 to 4"]
)
assert kept["landmark, layer 1"] < 0.3 and kept["last token, layer 5"] < 0.3
assert kept["landmark, layer 5"] > 0.7 and kept["last token, layer 1"] > 0.7
