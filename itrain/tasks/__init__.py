"""Tasks: questions to a model, one file per task."""

from itrain.trust import QuotingError


class TaskError(QuotingError):
    """A task breaks its contract, or its text has no tokens in the model's vocabulary."""
