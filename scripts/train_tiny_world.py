"""Train the embedded language model of the tiny world, and publish it with its data card.

    python scripts/train_tiny_world.py            # writes itrain/assets/tiny_world
    python scripts/train_tiny_world.py --check    # retrains elsewhere and compares with the published card

The result is deterministic for a seed, a number of threads and a version of torch.
"""

import argparse
import json
import math
import platform
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from itrain.models import ANSWER
from itrain.results.markdown import markdown
from itrain.tiny_world import (
    ASSETS,
    END_OF_TEXT,
    FACTS,
    MIXTURE,
    UNKNOWN,
    EvaluationItem,
    Grammar,
    evaluation_sets,
    vocabulary,
)

HIDDEN_SIZE = 80
NUM_LAYERS = 6
NUM_HEADS = 5
MAX_POSITIONS = 64

LEARNING_RATE = 2.5e-3
FINAL_LEARNING_RATE = 0.02  # as a share of LEARNING_RATE
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.01
TOKENS_PER_BATCH = 2500
SMALLEST_BATCH = 8  # rarer sentence lengths are skipped: a handful of sentences makes a noisy step
DOCUMENTS_PER_ROUND = 100_000

# The attention of the first blocks learns slowly. Left alone, so small a model moves a name's gender to the end of the
# sentence in its first or second block; with this handicap the move happens in the middle blocks, as it does in Pythia.
SLOW_ATTENTION_BLOCKS = 2
SLOW_ATTENTION_FACTOR = 0.03

TOLERANCE = 0.01
ANSWERED = "When John slept , Sarah walked because"  # needs the order of words, so rotary embeddings too
LOGITS = 8  # of the likeliest words
LOGIT_TOLERANCE = 0.05
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Build the tokenizer in which every word of the tiny world is one token."""
    token_ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(token_ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, token_ids[END_OF_TEXT])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(vocabulary_size: int) -> transformers.GPTNeoXForCausalLM:
    """Build the untrained model: the architecture of Pythia, very small."""
    config = transformers.GPTNeoXConfig(
        vocab_size=vocabulary_size,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        intermediate_size=4 * HIDDEN_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.GPTNeoXForCausalLM(config)


def batches(token_ids: dict[str, int], seed: int) -> Iterator[Tensor]:
    """Yield token ids without end, each batch of sentences of one length, so that nothing is padded or packed."""
    grammar, rng = Grammar(seed), random.Random(seed)
    while True:
        by_length: dict[int, list[list[int]]] = defaultdict(list)
        for _ in range(DOCUMENTS_PER_ROUND):
            words = [END_OF_TEXT, *grammar.sentence()]
            by_length[len(words)].append([token_ids[word] for word in words])
        round_of_batches = [
            batch
            for length, documents in sorted(by_length.items())
            for batch in torch.tensor(documents).split(max(SMALLEST_BATCH, TOKENS_PER_BATCH // length))
            if len(batch) >= SMALLEST_BATCH
        ]
        rng.shuffle(round_of_batches)
        yield from round_of_batches


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Build the optimizer: weight decay on matrices only, and the slow group of the first blocks' attention."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        is_slow = any(f"layers.{block}.attention." in name for block in range(SLOW_ATTENTION_BLOCKS))
        groups[parameter.dim() > 1, is_slow].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": WEIGHT_DECAY if is_matrix else 0.0,
                "lr": LEARNING_RATE * (SLOW_ATTENTION_FACTOR if is_slow else 1.0),
            }
            for (is_matrix, is_slow), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def train(model: nn.Module, token_ids: dict[str, int], *, seed: int, steps: int) -> None:
    """Train the model on sentences of the grammar: linear warm-up, then a cosine."""

    def share_of_learning_rate(step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)

    optimizer = build_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_learning_rate)
    start = time.perf_counter()
    model.train()
    for step, batch in enumerate(islice(batches(token_ids, seed), steps), start=1):
        logits = model(input_ids=batch[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, items: Sequence[EvaluationItem]) -> float:
    """Return the share of the questions whose answer is the model's first choice among all words."""
    by_length: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
    for item in items:
        prompt = tokenizer(item.prompt)["input_ids"]
        by_length[len(prompt)].append((prompt, tokenizer.convert_tokens_to_ids(item.answer)))
    correct = 0
    for questions in by_length.values():
        prompts, answers = (torch.tensor(column) for column in zip(*questions, strict=True))
        predictions = model(input_ids=prompts).logits[:, -1].argmax(-1)
        correct += int((predictions == answers).sum())
    return correct / len(items)


def evaluate(model: nn.Module, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Return the accuracy and the number of questions of every evaluation set."""
    return {
        name: {"accuracy": round(accuracy(model, tokenizer, items), 4), "n": len(items)}
        for name, items in evaluation_sets().items()
    }


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, versions: dict[str, str]) -> dict[str, Any]:
    """Return the logits of the likeliest words after one prompt, by which releases are told that change results."""
    logits = model(input_ids=torch.tensor([tokenizer(ANSWERED)["input_ids"]])).logits[0, -1]
    highest = logits.topk(LOGITS)
    words = tokenizer.convert_ids_to_tokens(highest.indices.tolist())
    values = [round(value, 4) for value in highest.values.tolist()]
    return {
        "prompt": ANSWERED,
        "logits": dict(zip(words, values, strict=True)),
        "tolerance": LOGIT_TOLERANCE,
        "versions": versions,
    }


def train_and_save(folder: Path, *, seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Train one model, save it with its card and README, and return the card."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    start = time.perf_counter()
    train(model, tokenizer.get_vocab(), seed=seed, steps=steps)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = {
        "name": "tiny_world",
        "command": f"python scripts/train_tiny_world.py --seed {seed} --steps {steps} --threads {threads}",
        "seed": seed,
        "steps": steps,
        "threads": threads,
        "training_seconds": round(seconds),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": NUM_LAYERS,
        "vocabulary": len(tokenizer),
        "bytes": {file: (folder / file).stat().st_size for file in MODEL_FILES},
        "mixture": dict(MIXTURE),
        "slow_attention": {"blocks": SLOW_ATTENTION_BLOCKS, "factor": SLOW_ATTENTION_FACTOR},
        "accuracies": evaluate(model, tokenizer),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "README.md").write_text(readme(card))
    (folder / ANSWER).write_text(json.dumps(answer(model, tokenizer, card["versions"]), indent=2) + "\n")
    return card


def readme(card: dict[str, Any]) -> str:
    """Write the data card for people, with the numbers of the machine-readable one."""
    rows = []
    for ability in dict.fromkeys(name.partition("/")[0] for name in card["accuracies"]):
        unseen, seen = (card["accuracies"][f"{ability}/{split}"] for split in ("held_out", "seen"))
        rows.append([ability, *(f"{found['accuracy']:.3f} ({found['n']})" for found in (unseen, seen))])
    return README.format(
        **card,
        table=markdown(["ability", "held out", "seen"], rows),
        shares=", ".join(f"{name} {share:.0%}" for name, share in card["mixture"].items()),
        entities={name: len(facts) for name, (facts, _) in FACTS.items()},
        megabytes=sum(card["bytes"].values()) / 1e6,
        minutes=card["training_seconds"] / 60,
    )


README = """# tiny_world: the embedded language model

A GPT-NeoX of {layers} layers ({parameters:,} parameters, {megabytes:.2f} MB) that knows one tiny world: its
words, facts and grammar are all written in `itrain/tiny_world/`. It is trained from nothing on sentences of that
grammar alone; no other text or weights went into it. It exists so that experiments run in seconds, offline, on a model
that really has the ability they ask about.

Every word is one token ({vocabulary} tokens, split at white space). The tokenizer puts `<|endoftext|>` (id 0, also
the padding token) before a text; any other word than those of the tiny world becomes `<unk>` (id 1).

## What it knows

Top-1 accuracy over the whole vocabulary; in brackets the number of questions.

{table}

* **pronouns**: `Sarah walked because` -> `she`; with a distractor `When John slept , Sarah walked because` -> `she`;
  implicit causality `Sarah amused John because` -> `she`, `Sarah admired John because` -> `he`; coordinated subjects
  `Sarah and John walked because` -> `they`.
* **agreement**: `The author near the cars` -> `is`; `The cars that the author likes` -> `are`.
* **indirect_objects**: `When Mary and John went to the store , John gave a book to` -> `Mary`.
* **prices**: `Say yes if it costs between 3 and 9 dollars . It costs 5 dollars .` -> `Yes`.
* **geography**: {entities[geography]} real cities. The country decides the continent and the language, so these
  attributes are entangled.
* **atlas**: {entities[atlas]} invented cities. Any two of country, continent and language are exactly independent.
* **things**: {entities[things]} invented things with color, material and place, independent in the same way.
* **landmarks**: {entities[landmarks]} two-word names with a city each, invented except Space Needle and Eiffel Tower.
  Neither word alone tells the city.

Shares of the training sentences: {shares}.

## Splits

"Held out" means that the combination never occurs in training; a checksum of its words decides, so it is the same for
everybody. It does not mean that a word is new: every name, noun, city and number occurs in training.

* pronouns: one in ten (name, verb, connective) with the name as head of the subject, (name, verb, name) and
  (name, and, name);
* agreement: one in ten (noun, attractor, preposition) and (noun, attractor, verb), in any number;
* indirect objects: one in ten pairs of names, in either order, within these sentences;
* prices: one in ten (low, high, price);
* facts: one in five (entity, attribute, template), the first template of an attribute excepted. The fact itself is
  always stated through other templates, so held-out facts test the wording and not the knowledge.

## How it was made

    {command}

{minutes:.0f} minutes on {threads} CPU threads; python {versions[python]}, torch {versions[torch]}, transformers
{versions[transformers]}, tokenizers {versions[tokenizers]}. Same seed, threads and versions: same weights.
`python scripts/train_tiny_world.py --check` retrains and compares with `card.json`.

## Design choices and caveats

* **Slow attention.** The attention of the first {slow_attention[blocks]} blocks is trained with
  {slow_attention[factor]:.0%} of the learning rate. This sets where a name's gender moves to the last token: in the
  middle blocks, as in Pythia, and not in the first or second. The *place* of that move is therefore designed and no
  discovery; that there is such a move, and how it is represented, is learned.
* **A small language.** Names have exactly one gender, connectives are interchangeable, and outside the templates of
  the grammar the predictions mean nothing. The lists of names simplify English usage for the sake of the experiment.
* **Invented facts.** Only the geography and two landmarks are real. Do not take the others for facts.
"""


def check() -> int:
    """Retrain as the published card says; return 1 if an accuracy differs by more than the tolerance, else 0."""
    published = json.loads((ASSETS / "card.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        card = train_and_save(
            Path(folder), seed=published["seed"], steps=published["steps"], threads=published["threads"]
        )
    differences = {
        name: card["accuracies"][name]["accuracy"] - expected["accuracy"]
        for name, expected in published["accuracies"].items()
    }
    too_far = {name: difference for name, difference in differences.items() if abs(difference) > TOLERANCE}
    for name, difference in too_far.items():
        print(f"{name}: {difference:+.4f} against the published accuracy")
    print(f"{len(differences) - len(too_far)} of {len(differences)} accuracies agree within {TOLERANCE:.0%}")
    return 1 if too_far else 0


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--threads", type=int, default=1, help="more help little: the model is small")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder of the model (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="retrain as the card says; compare")
    arguments = parser.parse_args()
    if arguments.check:
        return check()
    card = train_and_save(arguments.output, seed=arguments.seed, steps=arguments.steps, threads=arguments.threads)
    for name, result in card["accuracies"].items():
        print(f"{result['accuracy']:.4f}  {name} ({result['n']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
