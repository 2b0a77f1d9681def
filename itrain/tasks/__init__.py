"""Tasks: questions to a model, one file per task."""
