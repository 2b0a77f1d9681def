"""Tasks: questions to a model, one file per task."""


class TaskError(ValueError):
    """A task breaks its contract, or its text has no tokens in the model's vocabulary."""
