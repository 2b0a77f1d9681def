"""Likeness: of a text and the same text under an edit, the one of the better style is to be nearer to the image."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from itrain.data import CounterfactualBatch
from itrain.objectives.base import Objective, Outcome


class AgainstUnedited(Objective):
    """Edited logits against unedited ones: edits must raise the new answer's and lower the former one's.

    loss = (CE([l(new), l'(new)], 1) + CE([l(old), l'(old)], 0)) / 2, in which l and l' are the base's logits without
    and under the edits, new and old the counterfactual and the base label; 0 where the label does not change. Gradients
    flow through both runs.

    With two texts as answers it is IIT-DAS's loss of both: a caption with the style of a description must be more like
    the image than before, a description with that of a caption less. Zur et al. 2024, "Updating CLIP to Prefer
    Descriptions Over Captions", section 3.

    Args:
        weight: as in :class:`~itrain.objectives.base.Objective`.
    """

    def forward(self, outcome: Outcome) -> Float[Tensor, " batch"]:
        batch, edited = outcome.batch, outcome.logits
        raised = edited - outcome.network(batch.base)
        new, old = (raised.gather(1, label[:, None])[:, 0] for label in (batch.counterfactual_label, batch.base_label))
        return (softplus(-new) + softplus(old)) / 2 * batch.changes

    def require(self, batch: CounterfactualBatch) -> None:
        if batch.base_label.ndim > 1:
            raise ValueError(
                "edited and unedited logits are compared for answers of one class, and these have several tokens"
            )
