"""Loggers that take single runs and whole sweeps: Weights & Biases, TensorBoard, trackio."""
