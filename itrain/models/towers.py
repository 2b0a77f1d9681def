"""Two towers, one of texts and one of images, asked which of two texts fits an image better.

Tensor letters: B batch, S sequence, D hidden, E embedding.
"""

from __future__ import annotations

from copy import deepcopy
from random import Random
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, normalize, scaled_dot_product_attention

from itrain.bounds import require_at_least
from itrain.inputs import ModelInputs
from itrain.models.base import ModelError
from itrain.tasks.captions import Captions

PARTS = ("text_model", "vision_model", "logit_scale")
"""What two towers have."""


class ChoiceOfText(nn.Module):
    """Two towers that say which of two texts fits each image better: exp(scale) [cos(t1, x), cos(t2, x)], (B, 2).

    The tower of texts is called twice, so sites in it name the call: ``.step0`` reads the first text, ``.step1`` the
    second, as in ``text.layer10.block_output.step0@last``. Inputs are :class:`~itrain.inputs.ComparedTexts`.

    Args:
        towers: a CLIPModel of transformers, or any module with the parts of one: ``text_model(input_ids,
            attention_mask)`` and ``vision_model(pixel_values)``, which give pooled states as a tensor or as
            ``pooler_output``, a ``logit_scale``, and ``text_projection`` and ``visual_projection`` where the states are
            not embeddings yet.

    Raises:
        ModelError: the module lacks one of the parts.
    """

    base_model_prefix: ClassVar[str] = "towers"
    """Where the model proper is, which PEFT asks of modules with a configuration."""

    def __init__(self, *, towers: nn.Module) -> None:
        super().__init__()
        if lacking := [name for name in PARTS if not hasattr(towers, name)]:
            raise ModelError(
                f"towers: {type(towers).__name__} has no '{lacking[0]}'; give two towers with {', '.join(PARTS)}, as "
                "a CLIPModel of transformers has them"
            )
        if hasattr(towers, "config"):
            self.config: Any = deepcopy(towers.config)
        self.towers = towers

    @property
    def base_model(self) -> nn.Module:
        """The towers, whose blocks and components keep their names."""
        return self.towers

    def forward(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        other_input_ids: Int[Tensor, "batch others"],
        pixel_values: Float[Tensor, "batch ..."],
        attention_mask: Int[Tensor, "batch sequence"] | None = None,
        other_attention_mask: Int[Tensor, "batch others"] | None = None,
    ) -> Float[Tensor, "batch 2"]:
        first = self.embed_texts(input_ids, attention_mask)
        second = self.embed_texts(other_input_ids, other_attention_mask)
        return self.scale * (torch.stack([first, second], 1) * self.embed_images(pixel_values)[:, None]).sum(-1)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """By what cosines are multiplied."""
        towers: Any = self.towers
        return towers.logit_scale.exp()

    def embed_texts(
        self, input_ids: Int[Tensor, "batch sequence"], attention_mask: Int[Tensor, "batch sequence"] | None = None
    ) -> Float[Tensor, "batch embedding"]:
        """The embeddings of texts, at unit length."""
        towers: Any = self.towers
        return self._embedded(towers.text_model(input_ids=input_ids, attention_mask=attention_mask), "text_projection")

    def embed_images(self, pixel_values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch embedding"]:
        """The embeddings of images, at unit length."""
        towers: Any = self.towers
        return self._embedded(towers.vision_model(pixel_values=pixel_values), "visual_projection")

    def _embedded(self, pooled: Any, projection: str) -> Float[Tensor, "batch embedding"]:
        states = pooled if isinstance(pooled, Tensor) else pooled.pooler_output
        return normalize(getattr(self.towers, projection, nn.Identity())(states), dim=-1)


class TwoTowers(nn.Module):
    """Untrained towers: a causal transformer of texts, read at their last token, and an MLP of images' features.

    Args:
        words: the size of the vocabulary.
        features: the numbers that an image has, in whatever shape.
        tokens: of the longest text.
        hidden_size, num_layers, num_heads: of the tower of texts; the tower of images has as wide a layer.
        embedding_size: of what both towers give.
    """

    def __init__(
        self,
        *,
        words: int,
        features: int,
        tokens: int = 32,
        hidden_size: int = 64,
        num_layers: int = 3,
        num_heads: int = 4,
        embedding_size: int = 32,
    ) -> None:
        super().__init__()
        require_at_least(1, words=words, features=features, tokens=tokens, num_layers=num_layers)
        require_at_least(1, hidden_size=hidden_size, num_heads=num_heads, embedding_size=embedding_size)
        if hidden_size % num_heads:
            raise ModelError(f"num_heads={num_heads}: each of them has an equal share of hidden_size={hidden_size}")
        self.text_model = TextTower(words, tokens, hidden_size, num_layers, num_heads)
        self.vision_model = ImageTower(features, 2 * hidden_size)
        self.text_projection = nn.Linear(hidden_size, embedding_size, bias=False)
        self.visual_projection = nn.Linear(2 * hidden_size, embedding_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), CLIP's start


class TextTower(nn.Module):
    """Blocks of causal attention over a text, and the state of its last token."""

    def __init__(self, words: int, tokens: int, hidden_size: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, hidden_size), nn.Embedding(tokens, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self, input_ids: Int[Tensor, "batch sequence"], attention_mask: Int[Tensor, "batch sequence"] | None = None
    ) -> Float[Tensor, "batch hidden"]:
        # Padding is on the right, where causal attention leaves it unseen.
        states = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            states = block(states)
        own = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return self.norm(states[rows, own.sum(1) - 1])


class Block(nn.Module):
    """Causal attention and an MLP, each of the normed states and added to them."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.q_proj, self.k_proj = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.v_proj, self.out_proj = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.fc1, self.fc2 = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, states: Float[Tensor, "batch sequence hidden"]) -> Float[Tensor, "batch sequence hidden"]:
        normed = self.attention_norm(states)
        query, key, value = (
            each(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out_proj(mixed.transpose(1, 2).flatten(2))
        return states + self.fc2(gelu(self.fc1(self.mlp_norm(states))))


class ImageTower(nn.Module):
    """One hidden layer over an image's features."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(features, width), nn.LayerNorm(width)

    def forward(self, pixel_values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch width"]:
        return self.norm(gelu(self.layer(pixel_values.flatten(1))))


def trained_towers(
    *,
    task: Captions,
    hidden_size: int = 64,
    num_layers: int = 3,
    num_heads: int = 4,
    embedding_size: int = 32,
    seed: int = 0,
    texts: int = 20_000,
    steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> ChoiceOfText:
    """Towers trained to tell which texts belong to which images, as CLIP is; the same weights each time.

    loss = (CE(s C, arange) + CE(s C^T, arange)) / 2 for the cosines C of a batch's texts and images: Radford et al.
    2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3. Texts are of both styles,
    about training scenes, and say some of what is seen.

    Args:
        task: gives texts and images.
        hidden_size, num_layers, num_heads, embedding_size: as :class:`TwoTowers` takes them.
        seed: of the start, the texts and the batches.
        texts: how many there are.
        steps, batch_size, learning_rate: of Adam, whose rate falls linearly to 0.

    Raises:
        ModelError: the task has no texts about images.
    """
    if not isinstance(task, Captions):
        raise ModelError(
            f"{type(task).__name__} has no texts about images, by which towers are taught; choose task=captions"
        )
    require_at_least(2, texts=texts, batch_size=batch_size)
    require_at_least(1, steps=steps)
    require_at_least(0, learning_rate=learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = TwoTowers(
            words=len(task.vocabulary),
            features=task.images[0].numel(),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            embedding_size=embedding_size,
        )
    model, random = ChoiceOfText(towers=made), Random(f"towers {seed}")
    scenes = random.choices(task.of_split("train"), k=texts)
    given = task.encode([task.any_text(random, scene) for scene in scenes])
    images, generator = task.images[torch.tensor(scenes)], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(texts, (batch_size,), generator=generator)
            optimizer.zero_grad()
            _contrast(model, given, images, rows).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _contrast(
    model: ChoiceOfText, texts: ModelInputs, images: Float[Tensor, "texts ..."], rows: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """The loss of telling some of the texts' images apart, and of telling the images' texts apart."""
    embedded = model.embed_texts(**{name: each[rows] for name, each in texts.arguments.items()})
    scores = model.scale * embedded @ model.embed_images(images[rows]).T
    own = torch.arange(len(rows))
    return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
