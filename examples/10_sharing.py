# %% [markdown]
# # 10. How do others use what you trained?
#
# A trained intervention is worth little in your own process alone. **What do you hand on, and does it act the same
# elsewhere?** Export, read the card, load, attach, generate, merge into the weights, and write another tool's format. About
# 25 seconds.

# %%
import itrain

model = itrain.load_embedded()
fit = itrain.fit("das_gender", site="layer4.block_output@last", data={"train_pairs": 256}, trainer={"max_epochs": 6})

# %% [markdown]
# ## What is in an export
#
# Two files: the trained weights, and a description of what they are. The base model is named there by a fingerprint; its
# weights are not in it, and no pickle is.

# %%
{path.name: f"{path.stat().st_size / 1000:.1f} kB" for path in sorted(fit.export.iterdir())}

# %%
fit.picture

# %% [markdown]
# ## The card
#
# `push_to_hub` writes a model card from the run, so that its claim and its controls travel with the weights. Here it is
# printed and not pushed.

# %%
import json

from itrain.sharing.card import card_of

described = json.loads((fit.export / "intervention_config.json").read_text())
print(card_of({"": described}, "you/das-gender").split("```")[0])

# %% [markdown]
# ## Load and attach
#
# `itrain.load` reads an export from a folder or the hub, and runs none of its author's code. Attached, it acts in your
# model, whatever calls that: here the model's own `generate`.

# %%
inputs = model.tokenizer("Mary walked because", return_tensors="pt")


def written(network):
    return model.tokenizer.decode(network.generate(**inputs, max_new_tokens=3, do_sample=False)[0][1:])


plain = written(model.model)
with itrain.load(fit.export).attach(model, source="John walked because"):
    swapped = written(model.model)
{"before": plain, "attached": swapped, "detached": written(model.model)}

# %% [markdown]
# ## Merge into the weights
#
# A swap needs a source, so it cannot become a weight. A steering vector can: it is added to a bias. The merged model needs
# no itrain.

# %%
vector = itrain.fit("steer_story", trainer={"max_epochs": 3})

# %%
merged = itrain.merge(itrain.load(vector.export, model), acts="all")
merged.save("merged", tokenizer=model.tokenizer)
sorted(merged.folded)

# %%
from transformers import AutoModelForCausalLM

again = AutoModelForCausalLM.from_pretrained("merged")
{"base": written(model.model), "merged, read by transformers": written(again)}

# %% [markdown]
# ## Other tools' files
#
# The swap goes to MIB's causal-variable track and comes back; the vector to a GGUF file, which llama.cpp reads.

# %%
import torch

itrain.save_mib(fit.module, "ARC_easy_GPTNeoXForCausalLM_answer")
back = itrain.load_mib("ARC_easy_GPTNeoXForCausalLM_answer", model)
(ours,), (theirs,) = (each.interchange.trained.values() for each in (fit.module, back))
base, source = torch.randn(2, 5, 80)
difference = (ours(base, source) - theirs(base, source)).abs().max().item()
print(f"largest difference {difference:.1e}")

# %% [markdown]
# ## What this notebook shows
#
# - An export holds the intervention alone, and acts in your own model until you detach it.
# - What takes no source can be merged; the result is a plain model of transformers.
# - Other tools' formats keep the same map.
#
# **Next.** `fit.module.push_to_hub("user/name")` publishes it with its card. All formats, and what each can hold, are in
# [Share what was trained](../docs/howto/sharing.md).

# %% tags=["claims"]
assert "she" in plain and " he " in f" {swapped} "
assert merged.folded and difference < 1e-5
assert written(model.model) == plain and written(again) != plain
