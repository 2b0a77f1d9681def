"""Greedy generation: the same tokens as running the edited model again on the growing text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from itrain.inputs import ModelInputs, PositionError
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import Edit
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from tests.models import CAUSAL_TYPES, HIDDEN, hook_count, sites, tiny_inputs, tiny_model

LENGTHS, NEW = (6, 4, 5), 5
VECTOR = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))


def edits(*texts: str) -> list[tuple[Site, Edit]]:
    return [(site, lambda base: base + 3 * VECTOR) for site in sites(*texts)]


def slowly(network: HookedNetwork, inputs: ModelInputs, edits: Sequence[tuple[Site, Edit]], new: int) -> Tensor:
    """Each prompt by itself, without padding or cache: the whole text so far is run for every token."""
    rows = []
    for row in range(inputs.batch_size):
        first, end = inputs.tokens[row].tolist()
        prompt = inputs.arguments["input_ids"][row : row + 1, first:end]
        text = prompt
        for _ in range(new):
            one = ModelInputs(
                arguments={"input_ids": text, "attention_mask": torch.ones_like(text)},
                answer=torch.tensor([text.shape[1] - 1]),
                tokens=torch.tensor([[0, prompt.shape[1]]]),
                stop=torch.tensor([text.shape[1]]),
            )
            text = torch.cat([text, network.edit(one, edits).argmax(-1)[:, None]], 1)
        rows.append(text[0, prompt.shape[1] :])
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_generation_equals_running_the_growing_text_again(model_type: str) -> None:
    network = HookedNetwork(tiny_model(model_type))
    acts = edits("layer0.block_output@first2+last2", "layer1.attention_output@last")
    for left in (False, True):
        inputs = tiny_inputs(LENGTHS, left=left)
        found = network.generate(inputs, acts, max_new_tokens=NEW)
        assert torch.equal(found, slowly(network, inputs, acts, NEW))
    assert not torch.equal(found, network.generate(inputs, [], max_new_tokens=NEW)), "the edits change nothing"
    assert hook_count(network.model) == 0


def test_a_replaying_network_generates_the_same() -> None:
    hooked = HookedNetwork(tiny_model("llama"))
    acts, inputs = edits("layer0.block_output@last"), tiny_inputs(LENGTHS)
    assert torch.equal(
        ReplayNetwork(hooked).generate(inputs, acts, max_new_tokens=NEW),
        hooked.generate(inputs, acts, max_new_tokens=NEW),
    )


def test_responses_among_the_inputs_are_left_out() -> None:
    """The prompt ends where ``tokens`` says, whatever follows it."""
    network, whole = HookedNetwork(tiny_model("llama")), tiny_inputs(LENGTHS)
    assert whole.tokens is not None
    prompts = replace(whole, tokens=whole.tokens - torch.tensor([0, 2]), stop=whole.tokens[:, 1])
    acts = edits("layer0.block_output@last")
    found = network.generate(prompts, acts, max_new_tokens=NEW)
    assert torch.equal(found, slowly(network, prompts, acts, NEW))
    assert not torch.equal(found, network.generate(whole, acts, max_new_tokens=NEW))


def test_prompts_are_moved_to_the_right_with_their_spans() -> None:
    inputs = tiny_inputs(LENGTHS, spans={"name": torch.tensor([[1, 3], [0, 2], [2, 3]])})
    prompts = inputs.prompts()
    assert prompts.tokens is not None and prompts.tokens.tolist() == [[0, 6], [2, 6], [1, 6]]
    for row, (start, stop) in enumerate(inputs.spans["name"].tolist()):
        moved = prompts.spans["name"][row].tolist()
        before, after = inputs.arguments["input_ids"][row], prompts.arguments["input_ids"][row]
        assert torch.equal(before[start:stop], after[slice(*moved)])
    assert prompts.arguments["attention_mask"].sum(1).tolist() == list(LENGTHS)
    assert torch.equal(prompts.keys, inputs.keys), "the same examples, however padded"


def test_a_text_that_has_ended_stays_ended() -> None:
    network, inputs = HookedNetwork(tiny_model("llama")), tiny_inputs(LENGTHS)
    free = network.generate(inputs, [], max_new_tokens=NEW)
    end = int(free[0, 1])
    found = network.generate(inputs, [], max_new_tokens=NEW, end=end)
    for row in range(len(free)):
        ended = (free[row] == end).nonzero()
        stop = int(ended[0]) if len(ended) else NEW
        width = found.shape[1]
        assert torch.equal(found[row, :stop], free[row, : min(stop, width)])
        assert (found[row, stop:] == end).all()


def test_generation_ends_when_all_texts_have() -> None:
    network, inputs = HookedNetwork(tiny_model("llama")), tiny_inputs((5,))
    first = network.generate(inputs, [], max_new_tokens=1)
    assert network.generate(inputs, [], max_new_tokens=NEW, end=int(first)).shape == (1, 1)


def test_a_position_that_a_prompt_lacks_is_refused_by_example() -> None:
    with pytest.raises(PositionError, match="example 1, which has 4 tokens"):
        HookedNetwork(tiny_model("llama")).generate(
            tiny_inputs(LENGTHS), edits("layer0.block_output@first5"), max_new_tokens=NEW
        )


def test_a_model_without_keys_and_values_is_refused() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, HIDDEN), nn.Linear(HIDDEN, 40)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Tensor:
            return self.head(self.embed(input_ids).cumsum(1))

    with pytest.raises(ValueError, match="Bag keeps no keys and values"):
        HookedNetwork(Bag()).generate(tiny_inputs(), [], max_new_tokens=2)


def test_logits_that_are_not_finite_give_no_token() -> None:
    """The largest of NaN logits is the first, whatever it stands for."""
    network, inputs = HookedNetwork(tiny_model("llama")), tiny_inputs(LENGTHS)
    (site,) = sites("layer0.block_output@last")
    with pytest.raises(RuntimeError, match=r"logits after example 0 are not finite, so there is no next token"):
        network.generate(inputs, [(site, lambda base: base * torch.nan)], max_new_tokens=NEW)
