"""What the benchmarks share: settings, random models and pairs, the ways to make a step, and how they are measured.

Tensor letters: B batch, S sequence, T tokens that run, H heads, D hidden, V vocabulary, K rank, N examples.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from itrain.architectures import blocks
from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS
from itrain.interventions.orthogonal import retract_after_steps
from itrain.networks.choose import make_network
from itrain.networks.forward import cache_of
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch

RANK = 16
LEARNING_RATE = 1e-3
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""How far loss and gradient may be from the reference's, relative to their norms."""

MIB = 1 << 20
Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model with random weights, where it is edited, and how many tokens and examples a step has."""

    config: Callable[[], PretrainedConfig]
    layer: int
    length: int
    batch_size: int
    dtype: torch.dtype = torch.float32

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=self.dtype)
        return model.requires_grad_(False).eval()

    def token(self, position: str) -> int:
        return {"middle": self.length // 2, "last": self.length - 1}[position]

    def site(self, position: str) -> Site:
        term = "last" if position == "last" else str(self.token(position))
        return Site(layer=self.layer, component="block_output", position=term)

    def pairs(self, count: int, device: torch.device | str = "cpu") -> CounterfactualBatch:
        """Pairs of random tokens with random labels, all different."""
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.config().vocab_size
        ids = torch.randint(0, vocabulary, (2, count, self.length), generator=generator)
        labels = torch.randint(0, vocabulary, (3, count), generator=generator)
        tokens = torch.tensor([0, self.length]).expand(count, 2)
        base, source = (
            ModelInputs(
                arguments={"input_ids": each, "attention_mask": torch.ones_like(each)},
                answer=torch.full((count,), self.length - 1),
                tokens=tokens,
            )
            for each in ids
        )
        return CounterfactualBatch(
            base=base,
            sources={"variable": source},
            base_label=labels[0],
            counterfactual_label=labels[1],
            contrast_label=labels[2],
            source_labels={"variable": labels[2]},
            variables={},
            groups=(("variable",),),
            group=torch.zeros(count, dtype=torch.long),
            isolates=torch.zeros(count, dtype=torch.bool),
        ).to(device)


def _neox(**sizes: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(initializer_range=0.04, bos_token_id=0, eos_token_id=1, **sizes)


def _llama(initializer_range: float = 0.04, **sizes: Any) -> LlamaConfig:
    return LlamaConfig(initializer_range=initializer_range, **sizes)


_SMALL = {"vocab_size": 40, "max_position_embeddings": 16}
_TOY = {**_SMALL, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_TOY_GPT2 = {**_SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4}
_C = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8}
_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
_A = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}

SETTINGS: Mapping[str, Setting] = {
    "toy": Setting(config=partial(_neox, **_TOY), layer=0, length=5, batch_size=4),
    "toy-gpt2": Setting(
        config=partial(GPT2Config, initializer_range=0.2, bos_token_id=0, eos_token_id=1, **_TOY_GPT2),
        layer=0,
        length=5,
        batch_size=4,
    ),
    "toy-llama": Setting(config=partial(_llama, **_TOY, num_key_value_heads=2), layer=0, length=5, batch_size=4),
    "a": Setting(
        config=partial(_neox, **_A, vocab_size=512, max_position_embeddings=64), layer=1, length=5, batch_size=64
    ),
    "b16": Setting(config=partial(GPT2Config, initializer_range=0.04), layer=6, length=16, batch_size=32),
    "b64": Setting(config=partial(GPT2Config, initializer_range=0.04), layer=6, length=64, batch_size=32),
    "c": Setting(
        config=partial(_llama, **_C, vocab_size=32000, intermediate_size=2816, max_position_embeddings=256),
        layer=7,
        length=64,
        batch_size=16,
    ),
    # Of this width and depth, weights of 0.04 would enlarge what bf16 rounds from block to block.
    "gpu-1b": Setting(
        config=partial(_llama, 0.02, **_1B, vocab_size=128256, intermediate_size=8192, max_position_embeddings=256),
        layer=7,
        length=64,
        batch_size=16,
        dtype=torch.bfloat16,
    ),
    # LlamaConfig's own sizes are those of Llama 7B.
    "gpu": Setting(
        config=partial(_llama, 0.02, max_position_embeddings=256),
        layer=15,
        length=64,
        batch_size=16,
        dtype=torch.bfloat16,
    ),
    # Enough for a step to be the card's work, not Python's.
    "gpu-long": Setting(
        config=partial(_llama, 0.02, max_position_embeddings=256),
        layer=15,
        length=256,
        batch_size=32,
        dtype=torch.bfloat16,
    ),
}
POSITIONS = ("middle", "last")


def first_rows(setting: Setting) -> Float[Tensor, "rank hidden"]:
    """The subspace that every way starts from."""
    matrix = torch.randn(setting.config().hidden_size, RANK, generator=torch.Generator().manual_seed(2))
    return torch.linalg.qr(matrix).Q.T.contiguous()


# ------------------------------------------------------------------------------------------------ ways to make a step


class Way(ABC):
    """One way to make a training step: batch, loss, backward pass and Adam on the subspace.

    ``anywhere`` says that its cost does not depend on the position.
    """

    anywhere = False
    parameters: list[nn.Parameter]

    def __init__(self, model: nn.Module, setting: Setting, pairs: CounterfactualBatch, position: str) -> None:
        self.model, self.setting, self.pairs, self.position = model, setting, pairs, position
        self.token = setting.token(position)
        self.device = next(model.parameters()).device
        self.order = random.Random(3)
        self.waiting: list[Tensor] = []

    @abstractmethod
    def loss(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The loss on some of the pairs."""

    @abstractmethod
    def matrix(self) -> Float[Tensor, "rank hidden"]:
        """R, the rows that span the subspace, as the loss uses them within ``parametrize.cached()``."""

    def prepare(self) -> None:
        """What is done once: keep the examples, if the way keeps any, and set up the optimizer."""
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)

    def probe(self, rows: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in R, which is the same whatever R is computed from."""
        with parametrize.cached():
            matrix = self.matrix()
            loss = self.loss(rows)
            (gradient,) = torch.autograd.grad(loss, matrix)
        return loss.detach(), gradient

    def kept_bytes(self) -> int:
        """What is kept of one pair from step to step."""
        return 0

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.next_rows()).backward()
        self.optimizer.step()

    def next_rows(self) -> Int[Tensor, " batch"]:
        """The next batch of a shuffled epoch."""
        if not self.waiting:
            seed = self.order.randrange(1 << 30)
            order = torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(seed))
            self.waiting = list(order.split(self.setting.batch_size))
        return self.waiting.pop()

    def there(self, tensor: Tensor) -> Tensor:
        """The tensor on the model's device, which is not waited for."""
        return tensor.to(self.device, non_blocking=True)

    def batches(self) -> Iterator[Int[Tensor, " batch"]]:
        yield from torch.arange(len(self.pairs)).split(self.setting.batch_size)

    def ids(self, inputs: ModelInputs, rows: Tensor) -> Tensor:
        return self.there(inputs.arguments["input_ids"][rows])

    def labels(self, rows: Tensor) -> Tensor:
        return self.there(self.pairs.counterfactual_label[rows])

    @property
    def source(self) -> ModelInputs:
        return self.pairs.sources["variable"]


class Pyvene(Way):
    """As in pyvene's tutorials: both runs in every step, and the loss on the last token's logits."""

    anywhere = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        pyvene = import_pyvene()
        settings = {"layer": self.setting.layer, "component": "block_output", "low_rank_dimension": RANK}
        config = pyvene.IntervenableConfig(
            [{**settings, "intervention_type": pyvene.LowRankRotatedSpaceIntervention}], type(self.model)
        )
        self.intervenable = pyvene.IntervenableModel(config, self.model)
        self.intervenable.set_device(self.device)
        self.intervenable.disable_model_gradients()
        (intervention,) = self.intervenable.interventions.values()
        self.layer = intervention.rotate_layer
        self.layer.weight = first_rows(self.setting).T.to(self.device)
        self.parameters = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]

    def loss(self, rows: Tensor) -> Tensor:
        base, source = ({"input_ids": self.ids(inputs, rows)} for inputs in (self.pairs.base, self.source))
        _, output = self.intervenable(base, [source], {"sources->base": self.token})
        return functional.cross_entropy(output.logits[:, -1].float(), self.labels(rows))

    def matrix(self) -> Tensor:
        return self.layer.weight.T

    def probe(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        with parametrize.cached():
            matrix = self.layer.weight
            loss = self.loss(rows)
            (gradient,) = torch.autograd.grad(loss, matrix)
        return loss.detach(), gradient.T


class NNsight(Way):
    """Two traces in every step; the subspace is itrain's."""

    anywhere = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        with _quiet():
            # By name: type checkers look for packages that they are told of, and this one is optional.
            self.wrapped: Any = import_module("nnsight").NNsight(self.model)
        path = next(name for name, module in self.model.named_modules() if module is blocks(self.model)[0])
        layers = reduce(getattr, path.split(".")[:-1], self.wrapped)
        self.block: Any = layers[self.setting.layer]
        self.intervention = _das(self.setting, self.device)
        self.parameters = list(self.intervention.parameters())

    def loss(self, rows: Tensor) -> Tensor:
        base, source = self.ids(self.pairs.base, rows), self.ids(self.source, rows)
        wrapped, block, token, intervention = self.wrapped, self.block, self.token, self.intervention
        with torch.no_grad(), wrapped.trace(source):
            taken = block.output[:, token].save()
        with wrapped.trace(base):
            hidden = block.output
            changed = hidden.clone()
            changed[:, token] = intervention(hidden[:, token].float(), taken.float()).to(hidden.dtype)
            block.output = changed
            logits = wrapped.output.logits[:, -1].save()
        return functional.cross_entropy(logits.float(), self.labels(rows))

    def matrix(self) -> Tensor:
        return self.intervention.subspace.rows


class Itrain(Way):
    """AlignmentSearch's own step, without Lightning: on plain hooks, or replayed, with blocks compiled or not."""

    def __init__(self, *args: Any, replay: bool, compile: bool = False) -> None:
        super().__init__(*args)
        self.anywhere = not replay
        # "on" refuses what it cannot replay, so that nothing else is ever measured under that name.
        self.network = make_network(self.model, replay="on" if replay else "off", compile=compile)
        self.search = alignment_search(self.network, self.setting, self.position)
        self.parameters = list(self.search.exported.parameters())

    def prepare(self) -> None:
        super().prepare()
        retract_after_steps(self.optimizer, self.search)
        if isinstance(self.network, ReplayNetwork):
            self.network.prepare([self.search.sites], [self.pairs.base], [self.source])
            with torch.no_grad():  # keeps the examples, and replay checks itself
                for rows in self.batches():
                    self.loss(rows)
            self.probe(next(self.batches()))  # and again with gradients

    def loss(self, rows: Tensor) -> Tensor:
        batch = self.pairs.take(rows)
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        logits = self.search.interchange(batch, self.search.trained)
        return functional.cross_entropy(logits, batch.counterfactual_label)

    def matrix(self) -> Tensor:
        (intervention,) = self.search.trained.values()
        return intervention.subspace.rows  # type: ignore[union-attr]

    def kept_bytes(self) -> int:
        if not isinstance(self.network, ReplayNetwork):
            return 0
        return sum(self.network.estimate([self.search.sites], [self.pairs.base], [self.source])) // len(self.pairs)


class Floor(Way):
    """By hand: the blocks above the site on the tokens from the edited one on, in plain torch.

    The last block attends and runs its MLP for the answer token only, unless ``whole``. What is kept of the examples is
    what replay keeps.
    """

    def __init__(self, *args: Any, whole: bool = False) -> None:
        super().__init__(*args)
        self.whole = whole
        self.family: _Family = _FAMILIES[self.model.config.model_type](self.model)  # type: ignore[union-attr, operator]
        self.free = nn.Parameter(first_rows(self.setting).to(self.device))
        self.parameters = [self.free]

    def prepare(self) -> None:
        super().prepare()
        layers = blocks(self.model)
        self.above = range(self.setting.layer + 1, len(layers))
        kept: dict[str, list[Tensor]] = {"hidden": [], "taken": []}
        earlier: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.above}
        for rows in self.batches():
            hidden, keys_values = self._run(self.pairs.base, rows)
            kept["hidden"].append(hidden[:, self.token :].clone())
            kept["taken"].append(self._run(self.source, rows)[0][:, self.token].float())
            for layer in self.above:
                keys, values = keys_values[layer]
                earlier[layer].append((keys[:, :, : self.token].clone(), values[:, :, : self.token].clone()))
        self.hidden, self.taken = torch.cat(kept["hidden"]), torch.cat(kept["taken"])
        self.earlier = {
            layer: tuple(torch.cat(each) for each in zip(*parts, strict=True)) for layer, parts in earlier.items()
        }
        place = torch.arange(self.setting.length, device=self.device)
        self.mask = place[self.token :, None] >= place
        self.family.start(place[None, self.token :])

    @torch.no_grad()
    def _run(self, inputs: ModelInputs, rows: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        found: list[Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])

        handle = blocks(self.model)[self.setting.layer].register_forward_hook(take)
        output = self.model(self.ids(inputs, rows), use_cache=True, logits_to_keep=1)
        handle.remove()
        return found[0], [(layer.keys, layer.values) for layer in cache_of(output).layers]

    def kept_bytes(self) -> int:
        kept = [self.hidden, self.taken, *(each for pair in self.earlier.values() for each in pair)]
        return sum(each.nbytes for each in kept) // len(self.pairs)

    def matrix(self) -> Tensor:
        columns, triangle = torch.linalg.qr(self.free.T)
        return (columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0)).T

    def probe(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix().detach().requires_grad_()
        loss = self._loss(rows, matrix)
        return loss.detach(), torch.autograd.grad(loss, matrix)[0]

    def loss(self, rows: Tensor) -> Tensor:
        return self._loss(rows, self.matrix())

    def _loss(self, rows: Tensor, matrix: Float[Tensor, "rank hidden"]) -> Tensor:
        label, rows = self.labels(rows), self.there(rows)
        hidden = self.hidden[rows]
        base = hidden[:, 0].float()
        hidden[:, 0] = (base + (self.taken[rows] - base) @ matrix.T @ matrix).to(hidden.dtype)
        for layer in self.above:
            earlier = tuple(each[rows] for each in self.earlier[layer]) if self.token else None
            alone = layer == self.above[-1] and not self.whole
            hidden = self.family.block(layer, hidden, earlier, self.mask, alone)
        return functional.cross_entropy(self.family.logits(hidden[:, -1]).float(), label)


def _das(setting: Setting, device: torch.device) -> DAS:
    intervention = DAS(setting.config().hidden_size, rank=RANK)
    intervention.subspace.rows = first_rows(setting)
    return intervention.to(device)


def alignment_search(
    network: Any, setting: Setting, position: str, learning_rate: float = LEARNING_RATE
) -> AlignmentSearch:
    """The search for a subspace at the setting's site, from the rows that every way starts from."""
    search = AlignmentSearch(
        network=network,
        sites=[setting.site(position)],
        intervention=partial(DAS, rank=RANK),
        optimizer=partial(torch.optim.Adam, lr=learning_rate),
    )
    (intervention,) = search.trained.values()
    search.exported.to(next(network.parameters()).device)
    subspace: Any = intervention.subspace  # type: ignore[union-attr]
    subspace.rows = first_rows(setting).to(subspace.rows.device)  # torch moves no matrix that is assigned
    return search


WAYS: Mapping[str, Callable[..., Way]] = {
    "pyvene": Pyvene,
    "nnsight": NNsight,
    "hooks": partial(Itrain, replay=False),
    "replay": partial(Itrain, replay=True),
    "floor": Floor,
    "floor-whole": partial(Floor, whole=True),
}
OPTIONAL = {"pyvene": "pyvene", "nnsight": "nnsight"}
"""Ways that need a package which itrain does not."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


def import_pyvene() -> Any:
    """The package, without what it prints and warns of."""
    with _quiet():
        import pyvene
    return pyvene


# ------------------------------------------------------------------------------------------------ the floor's blocks


class _Family(ABC):
    """Blocks and head of a kind of model, as functions of its weights."""

    def __init__(self, model: Any) -> None:
        self.layers = blocks(model)
        self.core, self.config = model.base_model, model.config
        self.head = model.get_output_embeddings().weight
        self.heads = model.config.num_attention_heads

    def start(self, positions: Int[Tensor, "1 tokens"]) -> None:
        """Make ready for tokens at these positions."""

    @abstractmethod
    def block(
        self,
        layer: int,
        hidden: Float[Tensor, "batch tokens hidden"],
        earlier: tuple[Tensor, ...] | None,
        mask: Tensor,
        alone: bool,
    ) -> Tensor:
        """What the block makes of the tokens, or of the last of them where it is asked for ``alone``."""

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch vocabulary"]: ...

    def split(
        self, joined: Float[Tensor, "batch tokens hidden"], heads: int
    ) -> Float[Tensor, "batch heads tokens size"]:
        return joined.view(*joined.shape[:2], heads, -1).transpose(1, 2)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, earlier: tuple[Tensor, ...] | None, mask: Tensor
    ) -> Float[Tensor, "batch tokens hidden"]:
        if earlier is not None:
            keys, values = torch.cat([earlier[0], keys], 2), torch.cat([earlier[1], values], 2)
        batch, heads, tokens, size = queries.shape
        groups = keys.shape[1]
        if tokens == 1:
            # The heads of a group take the place of the tokens.
            queries = queries.reshape(batch, groups, heads // groups, size)
            return functional.scaled_dot_product_attention(queries, keys, values).reshape(batch, 1, -1)
        result = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=groups != heads
        )
        return result.transpose(1, 2).reshape(batch, tokens, -1)


class _GPT2(_Family):
    def block(self, layer: int, hidden: Tensor, earlier: Any, mask: Tensor, alone: bool) -> Tensor:
        block: Any = self.layers[layer]
        weight, bias, size = block.attn.c_attn.weight, block.attn.c_attn.bias, hidden.shape[-1]
        normed = _layer_norm(hidden, block.ln_1)
        if alone:
            queries = _conv1d(normed[:, -1:], weight[:, :size], bias[:size])
            keys, values = _conv1d(normed, weight[:, size:], bias[size:]).split(size, 2)
            hidden = hidden[:, -1:]
        else:
            queries, keys, values = _conv1d(normed, weight, bias).split(size, 2)
        split = partial(self.split, heads=self.heads)
        attended = self.attend(split(queries), split(keys), split(values), earlier, mask)
        hidden = hidden + _conv1d(attended, block.attn.c_proj.weight, block.attn.c_proj.bias)
        inner = _conv1d(_layer_norm(hidden, block.ln_2), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        inner = functional.gelu(inner, approximate="tanh")
        return hidden + _conv1d(inner, block.mlp.c_proj.weight, block.mlp.c_proj.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(_layer_norm(hidden, self.core.ln_f), self.head)


class _NeoX(_Family):
    def start(self, positions: Tensor) -> None:
        cosine, sine = self.core.rotary_emb(self.head[:1], positions)
        self.rotary = cosine[:, None], sine[:, None]

    def block(self, layer: int, hidden: Tensor, earlier: Any, mask: Tensor, alone: bool) -> Tensor:
        block: Any = self.layers[layer]
        joined = _linear(_layer_norm(hidden, block.input_layernorm), block.attention.query_key_value)
        queries, keys, values = self.split(joined, self.heads).chunk(3, -1)
        rotary = self.rotary
        keys = _rotated(keys, *rotary)
        if alone:
            queries, hidden, rotary = queries[:, :, -1:], hidden[:, -1:], tuple(each[:, :, -1:] for each in rotary)
        attended = self.attend(_rotated(queries, *rotary), keys, values, earlier, mask)
        inner = functional.gelu(_linear(_layer_norm(hidden, block.post_attention_layernorm), block.mlp.dense_h_to_4h))
        return hidden + _linear(attended, block.attention.dense) + _linear(inner, block.mlp.dense_4h_to_h)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(_layer_norm(hidden, self.core.final_layer_norm), self.head)


class _Llama(_Family):
    def start(self, positions: Tensor) -> None:
        cosine, sine = self.core.rotary_emb(self.head[:1], positions)
        self.rotary = cosine[:, None], sine[:, None]

    def block(self, layer: int, hidden: Tensor, earlier: Any, mask: Tensor, alone: bool) -> Tensor:
        block: Any = self.layers[layer]
        normed = self._norm(hidden, block.input_layernorm)
        groups, rotary = self.config.num_key_value_heads, self.rotary
        keys = _rotated(self.split(_linear(normed, block.self_attn.k_proj), groups), *rotary)
        values = self.split(_linear(normed, block.self_attn.v_proj), groups)
        if alone:
            normed, hidden, rotary = normed[:, -1:], hidden[:, -1:], tuple(each[:, :, -1:] for each in rotary)
        queries = _rotated(self.split(_linear(normed, block.self_attn.q_proj), self.heads), *rotary)
        hidden = hidden + _linear(self.attend(queries, keys, values, earlier, mask), block.self_attn.o_proj)
        normed = self._norm(hidden, block.post_attention_layernorm)
        inner = functional.silu(_linear(normed, block.mlp.gate_proj)) * _linear(normed, block.mlp.up_proj)
        return hidden + _linear(inner, block.mlp.down_proj)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(self._norm(hidden, self.core.norm), self.head)

    def _norm(self, hidden: Tensor, norm: Any) -> Tensor:
        return functional.rms_norm(hidden, norm.weight.shape, norm.weight, self.config.rms_norm_eps)


_FAMILIES = {"gpt2": _GPT2, "gpt_neox": _NeoX, "llama": _Llama}


def _layer_norm(hidden: Tensor, norm: nn.LayerNorm) -> Tensor:
    return functional.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(hidden: Tensor, linear: nn.Linear) -> Tensor:
    return functional.linear(hidden, linear.weight, linear.bias)


def _conv1d(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, hidden.reshape(-1, hidden.shape[-1]), weight).view(*hidden.shape[:2], -1)


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    size = cosine.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cosine + torch.cat([-second, first], -1) * sine
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


# ------------------------------------------------------------------------------------------------ measuring


class EqualityError(AssertionError):
    """Two ways do not compute the same."""


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Those of the forward pass, from shapes (B, heads, tokens, size), for keys that groups of heads share too."""
    batch, heads, tokens, size = query
    return 2 * batch * heads * tokens * key[2] * (size + value[3])


def attention_backward_flops(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Those of the backward pass, in which the scores are computed again."""
    batch, heads, tokens, size = query
    return 2 * batch * heads * tokens * key[2] * (3 * size + 2 * value[3])


def count_flops(run: Callable[[], Result]) -> tuple[Result, int]:
    """What a run returns, and its FLOPs."""
    # Earlier releases of torch refuse keys that heads share.
    kernels = ("efficient", "flash", "cudnn")
    names = {f"_scaled_dot_product_{kernel}_attention": attention_flops for kernel in kernels}
    names |= {f"{name}_backward": attention_backward_flops for name in names}
    counted = {getattr(torch.ops.aten, name): formula for name, formula in names.items()}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        result = run()
    return result, counter.get_total_flops()


def relative_errors(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of loss and gradient, in norms."""
    return tuple(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))  # type: ignore[return-value]


def require_equal(probes: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """The ways' errors in loss and gradient, against the first of them.

    Raises:
        EqualityError: one is larger than rounding, or there is no gradient that could differ.
    """
    reference, expected = next(iter(probes.items()))
    if not float(expected[1].norm()) > 0:
        raise EqualityError(f"{reference} has no gradient, so that equality would mean nothing")
    errors = {name: relative_errors(probe, expected) for name, probe in probes.items()}
    for name, each in errors.items():
        if not max(each) <= TOLERANCES[dtype]:
            raise EqualityError(f"{name} differs from {reference}: loss by {each[0]:.1e}, gradient by {each[1]:.1e}")
    return errors


class Sample(NamedTuple):
    """Seconds of one step."""

    wall: float
    cpu: float


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def text(self, scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
        low, median, high = (f"{each * scale:.{digits}f}" for each in self)
        return f"{median}{unit} [{low}–{high}]"  # noqa: RUF001


def sampled(run: Callable[[], object], repeats: int = 1) -> Sample:
    """Mean time of some runs in a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return Sample((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats)


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, *, shortest: float = 0.1
) -> dict[str, list[Sample]]:
    """Samples of each run, one a round, in an order that is shuffled anew in each round.

    So all see the same noise of the machine. Runs are repeated within a sample until it takes ``shortest`` seconds.
    """
    repeats = {}
    for name, run in runs.items():
        once = sampled(run).wall
        if rounds > 1 and once < shortest:
            once = sampled(run).wall  # without what is set up at the first one
        repeats[name] = max(1, round(shortest / once)) if rounds > 1 else 1
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    order, names = random.Random(0), list(runs)
    gc.collect()
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            samples[name].append(sampled(runs[name], repeats[name]))
    return samples


def ratios(numerator: Sequence[Sample], denominator: Sequence[Sample], clock: str = "wall") -> Quartiles:
    """Of the times round by round."""
    pairs = zip(numerator, denominator, strict=True)
    return Quartiles.of([getattr(a, clock) / getattr(b, clock) for a, b in pairs])


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most since :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> int:
    """Count the peak anew; returns what is resident now, once what is no longer used has been given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident_bytes()


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def machine() -> str:
    """What was measured on, without a date."""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    version = torch.__version__.partition("+")[0]
    return (
        f"{os.cpu_count()} CPU cores{device}, {torch.get_num_threads()} threads, torch {version}, "
        f"transformers {transformers.__version__}"
    )
