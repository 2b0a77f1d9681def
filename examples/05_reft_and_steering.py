# %% [markdown]
# # 5. Can edits of activations change how a model writes?
#
# The weights stay as they are; only activations are edited. **How far does that go?** You will teach a style with LoReFT, and
# raise a concept with one steering vector. You will read what the model writes before and after. About 30 seconds.

# %%
import itrain

model = itrain.load_embedded()
model.run("The rarvet is built from").text(max_new_tokens=10)

# %% [markdown]
# ## Teach a style
#
# The wanted answer: the right value, then always `It costs 5 dollars .`, and the end. LoReFT learns an edit of rank 7 at
# the first two and the last two tokens of the prompt, in five layers: 5,635 parameters.

# %%
reft = itrain.fit("reft_style", trainer={"max_epochs": 15})

# %% [markdown]
# Exact match counts whole answers, for things that no training text has. The curve shows how fast it gets there.

# %%
reft.picture

# %% [markdown]
# ## Before and after, in your own words
#
# `attach` puts the edit into your model until the `with` ends. `generate` is the model's own.

# %%
prompt = "The rarvet is built from"
inputs = model.tokenizer(prompt, return_tensors="pt")


def written():
    tokens = model.model.generate(**inputs, max_new_tokens=9, do_sample=False)[0]
    return model.tokenizer.decode(tokens[inputs.input_ids.shape[1] :])


before = written()
with itrain.load(reft.export).attach(model):
    after = written()
{"before": before, "after": after, "detached": written()}

# %% [markdown]
# ## Steer with one vector
#
# Steering adds one vector at every token. Here it is the difference between mean activations of texts with and without a
# concept, in layer 2. Nothing is trained but the strength: it is chosen on half of the prompts and scored on the other half.
#
# What is strength 1? At *matched norm* each vector is as long as a typical activation at its site. So a random vector of the
# same length is a fair control.

# %%
steered = itrain.fit("steer_concept")

# %% [markdown]
# The table scores three things from 0 to 2: is the concept there, is the prompt answered, is the text fluent. The steering
# score is their harmonic mean, so that a text which only shouts the concept scores low. A word judge scores, not a person.

# %%
steered.picture

# %% [markdown]
# Read two columns together. The rate of mentions rises with the strength up to a point, and the perplexity rises all the
# way. Beyond half a norm, the text breaks down and so does the score. The best score is well below 2: one vector in a model
# of this size is a weak lever.
#
# ## Strength by hand
#
# An attached export acts at the strength that its test has chosen, which counts as 1 here. Four times that is too much.

# %%
vector = itrain.load(steered.export)
texts = {}
for strength in (0, 1, 4):
    with vector.attach(model, strength=strength):
        inputs = model.tokenizer("The pilot is loud .", return_tensors="pt")
        texts[strength] = written()
texts

# %% [markdown]
# ## What this notebook shows
#
# - LoReFT teaches a style with 5,635 parameters, on things that it never saw.
# - One steering vector raises a concept; a random one of the same norm does not.
# - Too much strength breaks the text: a rate alone would have hidden it.
#
# **Next.** `recipe=lora_style` reaches the same with ten times the parameters. `recipe=reft_r1_story` trains a direction that
# steers better. [One-off runs](../docs/howto/notebook.md) shows `acts=` and `strength=`; all kinds of edit are in
# [Methods](../docs/reference/methods.md).

# %% tags=["claims"]
assert reft.figures["before/exact_match"] < 0.05 < 0.9 < reft.figures["test/exact_match"]
assert "It costs 5 dollars ." in after and "It costs 5 dollars ." not in before
assert steered.figures["test/steering_score"] > 2 * steered.figures["test/random_vector/steering_score"]
assert texts[0] != texts[1] and texts[4] not in (texts[0], texts[1])
