# %% [markdown]
# # 4. Can a network be taught to have a variable?
#
# [DAS](01_gender.ipynb) looks for a variable in a network that is frozen. *Interchange intervention training* (IIT) turns
# this round: it trains the network until a variable sits where you want it. **Can the gender be put into 16 neurons of the
# verb, where the model keeps none?** And what does the model lose by it?
#
# You will look before, train adapters (LoRA), and look after. About 40 seconds.

# %%
import itrain

task, data = {"templates": "simple"}, {"train_pairs": 2048, "test_pairs": 128}
site = "layer2.block_output@verb"

# %% [markdown]
# ## Before
#
# Swap the whole vector at the verb, in the model as it is. If any direction carried the gender, the whole vector would.

# %%
model = itrain.load_embedded()
model.run("Mary walked because", "layer2.block_output@2", source="John walked because")

# %% [markdown]
# Nothing moves: `she` stays the answer.
#
# ## Train the network
#
# The recipe trains two losses at once. One is the task: the right pronoun. The other is the interchange: swap neurons 0 to
# 15 at the verb from the source, and the answer must be the source's pronoun. Only LoRA adapters are trained.

# %%
fit = itrain.fit("iit_lora_gender", task=task, data=data, site=site)

# %% [markdown]
# Read the column of label-changing pairs: from 0 before training to nearly all after. The line `task accuracy` says what it
# cost: nothing on held-out names. The random subspace tells that the variable is in these 16 neurons, and not everywhere.

# %%
fit.picture

# %% [markdown]
# ## After, by hand
#
# The trained network is a model as any other. Swap the 16 neurons in it, for names that no training pair has.

# %%
trained = fit.base_model
swap = {"source": "John walked because", "dims": range(16)}
after = trained.run("Mary walked because", "layer2.block_output@2", **swap)
after

# %% [markdown]
# Did the variable move, or is it now in both places? Swap the name's token instead.

# %%
both = trained.run("Mary walked because", "layer2.block_output@1", source="John walked because")
both

# %% [markdown]
# ## Is it the second loss that does it?
#
# The control trains the same adapters on the task alone, with the weight of the interchange at 0.

# %%
plain = itrain.fit("iit_lora_gender", "training.interchange_weights=0", task=task, data=data, site=site,
                   trainer={"max_epochs": 2})  # fmt: skip
names = ["test/iia_changing_argmax", "test/task_accuracy"]
{kind: {name: each.figures[name] for name in names} for kind, each in {"IIT": fit, "task alone": plain}.items()}

# %% [markdown]
# ## What this notebook shows
#
# - Before training no part of the verb carries the gender.
# - IIT puts it into 16 chosen neurons, at no cost in accuracy on held-out names.
# - Training on the task alone does not.
#
# IIT shows that a network *can* have this structure. It says nothing about the network that you started from.
#
# **Next.** `recipe=iit_hierarchical_equality` trains a whole network, two variables at once. `recipe=siit_hierarchical_equality`
# adds that nothing else may matter (strict IIT). All trainings are in [Methods](../docs/reference/methods.md).

# %% tags=["claims"]
assert fit.figures["before/iia_changing_argmax"] < 0.05 < 0.9 < fit.figures["test/iia_changing_argmax"]
assert fit.figures["test/task_accuracy"] > 0.97
assert plain.figures["test/iia_changing_argmax"] < 0.1
assert after.top(1)[0][0].text == "he" and after.plain.top(1)[0][0].text == "she"
