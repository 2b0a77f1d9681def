"""Descriptions and captions: which of two texts says what an image shows, and which adds what it does not show?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from math import prod
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ComparedTexts, ModelInputs
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split, Task

Style = Literal["description", "caption"]
SEEN: Mapping[str, Sequence[str]] = {
    "object": [
        "dog",
        "cat",
        "horse",
        "bird",
        "boat",
        "car",
        "train",
        "bike",
        "house",
        "tree",
        "chair",
        "lamp",
        "clock",
        "statue",
        "bridge",
        "tower",
    ],
    "colour": ["red", "blue", "green", "yellow", "white", "black", "brown", "grey"],
    "place": ["beach", "street", "field", "forest", "harbour", "station", "garden", "square"],
    "light": ["sunny", "cloudy", "foggy", "rainy", "snowy", "dark"],
}
"""What an image shows, and the words for it."""
UNSEEN: Mapping[str, Sequence[str]] = {
    "name": ["anna", "boris", "clara", "david", "emma", "felix", "greta", "hugo", "irene", "jonas", "karin", "lukas"],
    "event": ["festival", "wedding", "parade", "election", "concert", "exhibition"],
    "year": ["1931", "1948", "1956", "1967", "1973", "1989", "1994", "2003"],
}
"""What a caption adds."""
FRAMES: Mapping[Style, Sequence[Sequence[str]]] = {
    "description": (
        ("a", "{colour}", "{object}", "near the {place}", "in {light} light"),
        ("{light} view of", "a", "{colour}", "{object}", "at the {place}"),
    ),
    "caption": (
        ("{name} and the", "{colour}", "{object}", ", {place}", ", {light} day", "of {year}"),
        ("the {event} of {year} :", "{object}", ", {colour}", ", {place}", ", {light}"),
    ),
}
"""The wordings of each style, in pieces that say one thing each."""
OPTIONAL = ("colour", "place", "light")
"""Of which each text leaves out one."""
PADDING, END = "<pad>", "<end>"
SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled scenes that each split draws from."""


class Captions(Task):
    """Of two texts for an image, a description and a caption, the description is to be preferred.

    A description says what the image shows, so that it can stand in its place; a caption adds what it does not show: a
    name, an event, a year. Both name the object and two of its colour, place and light. The variable is the texts'
    style, ``description`` where the first one is it and the second a caption, else ``caption``: interchanging it at
    both texts swaps their styles, which must swap the preference. Half of the pairs change it; sources are of other
    images. Train, validation and test have disjoint scenes.

    A synthetic stand-in for Concadia, as Zur et al. 2024, "Updating CLIP to Prefer Descriptions Over Captions", use it.

    Args:
        image_shape: an image's numbers: the sum of a random vector for each thing seen, and noise.
        noise: standard deviation of the noise, where that of a thing seen is 1.
        seed: of the images, and of how scenes are divided among the splits.
    """

    variables = ("style",)

    def __init__(self, *, image_shape: Sequence[int] = (64,), noise: float = 0.5, seed: int = 0) -> None:
        require_at_least(1, image_shape=min(image_shape, default=0))
        require_at_least(0, noise=noise)
        self.scenes = [dict(zip(SEEN, words, strict=True)) for words in product(*SEEN.values())]
        self.images = self._draw(image_shape, noise, torch.Generator().manual_seed(seed))
        self.shuffled = Random(seed).sample(range(len(self.scenes)), len(self.scenes))
        self.written: Mapping[Style, Sequence[str]] = {style: _written(style) for style in FRAMES}
        """The wordings of each style, with fields for what is seen."""
        words = {word for texts in self.written.values() for text in texts for word in text.split()}
        seen = [word for listed in SEEN.values() for word in listed]
        self.vocabulary = [PADDING, END, *seen, *sorted(each for each in words if "{" not in each)]
        self._ids = {word: number for number, word in enumerate(self.vocabulary)}
        self.causal_model = CausalModel(
            inputs={
                "scene": range(len(self.scenes)),
                "first": tuple(FRAMES),
                **{style: range(len(texts)) for style, texts in self.written.items()},
            },
            mechanisms={
                "style": lambda first: first,
                "preferred": lambda style: "first" if style == "description" else "second",
            },
            output="preferred",
        )

    @property
    def outputs(self) -> Sequence[str]:
        return ("first", "second")

    def values(self, variable: str) -> Sequence[Any]:
        return tuple(FRAMES) if variable == "style" else super().values(variable)

    def label(self, output: str) -> int:
        return self.outputs.index(output)

    def sample(self, random: Random, split: Split) -> Pair:
        return Pair(base=self._setting(random, split), sources={"style": self._setting(random, split)})

    def inputs(self, settings: Sequence[Setting]) -> ComparedTexts:
        both = [self.texts(setting) for setting in settings]
        first, second = (self.encode(texts) for texts in zip(*both, strict=True))
        scenes = torch.tensor([setting["scene"] for setting in settings])
        return ComparedTexts.of(first, second, ModelInputs(arguments={"pixel_values": self.images[scenes]}))

    def texts(self, setting: Setting) -> tuple[str, str]:
        """The first and the second text of a setting."""
        seen = self.scenes[setting["scene"]]
        one, other = (self.written[style][int(setting[style])].format(**seen) for style in FRAMES)
        return (one, other) if setting["first"] == "description" else (other, one)

    def encode(self, texts: Sequence[str]) -> ModelInputs:
        """The texts' words as numbers, the end's after them, padded on the right."""
        rows = [[self._ids[word] for word in (*text.split(), END)] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self._ids[PADDING]] * (width - len(row)) for row in rows])
        mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
        return ModelInputs(arguments={"input_ids": ids, "attention_mask": mask}, texts=texts)

    def of_split(self, split: Split) -> Sequence[int]:
        """The scenes of a split."""
        start, stop = (round(share * len(self.shuffled)) for share in SHARES[split])
        return self.shuffled[start:stop]

    def any_text(self, random: Random, scene: int) -> str:
        """A text of either style that says some of what is seen, as towers are trained with."""
        said = random.sample(list(SEEN), random.randint(1, len(SEEN)))
        frame = random.choice(FRAMES[random.choice(list(FRAMES))])
        added = {name: random.choice(words) for name, words in UNSEEN.items()}
        return _fill(frame, set(SEEN).difference(said)).format(**self.scenes[scene], **added)

    @torch.no_grad()
    def abilities(self, model: nn.Module) -> Mapping[str, float]:
        """What the model can do besides: the accuracy of zero-shot classification of the test images, ``transfer``.

        An image's class is that whose text is nearest to it; the accuracy is the mean over what is seen, the object,
        its colour, place and light.

        Raises:
            TaskError: the model does not embed texts and images apart.
        """
        towers: Any = model
        if not hasattr(towers, "embed_texts") or not hasattr(towers, "embed_images"):
            raise TaskError(
                f"task {type(self).__name__}: images are classified by their likeness to texts, and "
                f"{type(model).__name__} embeds neither by itself; wrap its towers in itrain.models.ChoiceOfText"
            )
        device, scenes = next(model.parameters()).device, self.of_split("test")
        images = towers.embed_images(self.images[torch.tensor(scenes)].to(device))
        right = []
        for name, words in SEEN.items():
            texts = [_fill(FRAMES["description"][0], set(SEEN) - {name}).format(**{name: word}) for word in words]
            classes = towers.embed_texts(**self.encode(texts).to(device).arguments)
            found = (images @ classes.T).argmax(1).tolist()
            right += [words[place] == self.scenes[scene][name] for place, scene in zip(found, scenes, strict=True)]
        return {"transfer": sum(right) / len(right)}

    def _setting(self, random: Random, split: Split) -> dict[str, Any]:
        wordings = {style: random.randrange(len(texts)) for style, texts in self.written.items()}
        return {"scene": random.choice(self.of_split(split)), "first": random.choice(list(FRAMES)), **wordings}

    def _draw(self, shape: Sequence[int], noise: float, generator: torch.Generator) -> Float[Tensor, "scenes ..."]:
        """The images of all scenes, scaled to a standard deviation of about 1."""
        size = prod(shape)
        vectors = {name: torch.randn(len(words), size, generator=generator) for name, words in SEEN.items()}
        chosen = {name: self._column(name) for name in SEEN}
        total = torch.stack([vectors[name][chosen[name]] for name in SEEN]).sum(0)
        total = total + noise * torch.randn(total.shape, generator=generator)
        return (total / (len(SEEN) + noise**2) ** 0.5).view(-1, *shape)

    def _column(self, name: str) -> Int[Tensor, " scenes"]:
        places = {word: place for place, word in enumerate(SEEN[name])}
        return torch.tensor([places[scene[name]] for scene in self.scenes])


def _written(style: Style) -> list[str]:
    """All wordings of a style that leave out one thing, with what they add filled in."""
    found = []
    for frame, left_out in product(FRAMES[style], OPTIONAL):
        text = _fill(frame, {left_out})
        names = [name for name in UNSEEN if f"{{{name}}}" in text]
        kept = {name: f"{{{name}}}" for name in SEEN}
        for words in product(*(UNSEEN[name] for name in names)):
            found.append(text.format(**kept, **dict(zip(names, words, strict=True))))
    return found


def _fill(frame: Sequence[str], left_out: Collection[str]) -> str:
    """The frame's pieces, without those that say what is left out."""
    return " ".join(piece for piece in frame if not any(f"{{{name}}}" in piece for name in left_out))
