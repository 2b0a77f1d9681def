"""How to read each table and picture: a few sentences that stand beside it, wherever it is shown."""

from __future__ import annotations

RULES_READ = (
    "argmax: that answer is the likeliest of all outputs; pairwise: it is likelier than the answer it competes with."
)
PAIRS_READ = (
    "IIA is the share of pairs that get the causal model's answer after the swap. Changing pairs should get a new "
    f"answer, preserving pairs keep theirs. {RULES_READ} A finding is high where the random subspace is low."
)
ATTRIBUTES_READ = (
    "Cause: the share of pairs in which the swapped attribute changes as it should. Isolate: the share in which "
    f"another attribute stays. Disentangle: the mean of both. {RULES_READ}"
)
SHIFTS_READ = (
    "Odds: how far the log odds move from the base's answer to the counterfactual one; 0 is no effect. Logit gap: by "
    "how much the base's answer leads, clean and edited. FLDD: by how many percent that gap falls; % of full: as a "
    "share of the whole vector's fall. Flipped: the share of pairs whose preference is reversed."
)
PROBES_READ = (
    "Control: the same probe trained on random labels. Selectivity: probe minus control. Majority: always guessing the "
    "most frequent class. A probe shows what can be read, not what the model uses."
)
TRACE_READ = (
    "Corrupted: noise on the subject's tokens. Restored: the same with clean activations put back at the site. A site "
    "matters where restored is near clean."
)
TEXTS_READ = (
    "Exact match: the share of greedy generations that equal the wanted text. Perplexity: that of the wanted text; "
    "lower is better, 1 is certain. Before: the same model without the edit."
)
STEERED_READ = (
    "Concept: the share of continuations that mention the concept. Perplexity: that of the continuations under the "
    "untouched model, divided by that of unsteered ones; far above 1 the text breaks. A control should do little."
)
JUDGED_READ = (
    "Score: the harmonic mean of concept, instruct and fluency, each from 0 to 2. Rate: the share of continuations "
    "that mention the concept. Ratio: their perplexity, divided by that of unsteered ones."
)
DETECTION_READ = (
    "AUROC: how well scores rank texts with the concept above the others; 0.5 is chance. TPR, FPR: the share of texts "
    "with and without it that raise an alarm. Below a figure: its 95% interval, or ± its standard deviation over "
    "random directions. Rare F1: F1 where few texts have the concept (1 in 100 unless set). Control task: the same "
    "detector on arbitrary labels of types of texts; selectivity: AUROC minus that."
)
BARS_READ = "A bar is a figure on held-out data; the whisker is its 95% interval over pairs or examples."
LINES_READ = "A dot is a figure on held-out data; the vertical line through it is its 95% interval."
CURVE_READ = "Grey: the loss of each training step."
VALIDATION_READ = "Blue dots: validation, read on the right axis."
_OF_CALLS = "a column is the call, or the token, that is edited or read."
ROWS_READ = {
    "layer": "A row is a layer, the last on top; a column is the token that is edited or read.",
    "module": f"A row is a module, the last on top; {_OF_CALLS}",
    "site": f"A row is a layer or a module, the last on top; {_OF_CALLS}",
}
"""What rows and columns of maps are, by the name of the rows."""
MAPS_READ = (
    "A value is the mean over seeds on held-out data. Compare each map with the random subspace and the whole vector."
)
DETECTOR_MAPS_READ = (
    "A value is the mean over seeds on held-out texts; 0.5 is chance. The column all is all tokens of a text together. "
    "Compare with random directions and the random model below."
)
DETECTORS_BEST_READ = (
    "The best site is layer@position; +2: two other sites score the same; none: nothing is above chance. 95%: the "
    "interval over texts. Control task: the same detector on random labels of types of texts, and selectivity: how far "
    "it lies below. Random directions: their mean AUROC ± its standard deviation. Lowest shift: the test set in "
    "another wording that it tells least in. Gap: AUROC on training texts minus that on held-out ones."
)
DIFFERENCES_READ = (
    "A value is how far the probe lies above the IIA of the method, both from 0 at chance to 1. High: what the probe "
    "reads there is not what the method can change. Near 0: both find it, or neither does."
)
RULE_READ = (
    "Argmax: the counterfactual answer is the likeliest of all outputs. The column iia_changing_pairwise of the "
    "table asks only that it is likelier than the base's own."
)
BEST_READ = (
    "The best site is layer@position, or a module's path with its step and position; +2: two other sites score the "
    "same; none: nothing is above chance. 95%: the interval of the value. Beside it stand the controls at that site, "
    "the gap from training to held-out pairs, and the divergence of edited from natural activations (in brackets: "
    "natural ones from each other)."
)
BEYOND_READ = (
    "Read beyond: accuracy minus IIA of the learned method that comes nearest, both from 0 at chance to 1, where the "
    "95% interval of this difference lies above 0. What is read there is not shown to be used. Flagged "
    "probes are left out."
)
