"""What attached edits cost in generation: a GPT-2 of 124M random weights, alone and with edits, in turns.

    python scripts/bench_generate.py [--rounds 7] [--new 20] [--threads 1]

Prints the median CPU time of a generated token, its interquartile range, and its ratio to the model's alone. The order
of the ways changes from round to round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from itrain.inputs import Acts
from itrain.networks.attached import AttachedEdits
from itrain.networks.lane import EditAt
from itrain.sites import Site

PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("new", 20), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    ids = torch.randint(0, 50257, (1, PROMPT))
    vector = torch.randn(768)

    def edits(layers: Sequence[int], acts: Acts) -> list[EditAt]:
        sites = [Site(layer=layer, component="mlp_output", position="last") for layer in layers]
        return [EditAt(site, lambda base: base + vector, acts) for site in sites]

    ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "the model alone": nullcontext,
        "an edit at every token": lambda: AttachedEdits(model, edits([6], "all")),
        "an edit of the MLP outputs of all layers at every token": lambda: AttachedEdits(
            model, edits(range(12), "all")
        ),
        "an edit of the prompt alone": lambda: AttachedEdits(model, edits([6], "prompt")),
        "edits of all layers that never act": lambda: AttachedEdits(model, edits(range(12), (10**6,))),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds + 1):
        names = list(ways)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            with ways[name]():
                start = time.process_time()
                model.generate(ids, max_new_tokens=args.new, do_sample=False, pad_token_id=0, eos_token_id=None)
                taken = time.process_time() - start
            if round_:  # the first warms up
                times[name].append(taken / args.new)
    alone = median(times["the model alone"])
    for name, taken in times.items():
        low, _, high = quantiles(taken, n=4)
        print(f"{1e3 * median(taken):8.2f} ms ({1e3 * low:.2f}-{1e3 * high:.2f})  {median(taken) / alone:.3f}x  {name}")


if __name__ == "__main__":
    main()
