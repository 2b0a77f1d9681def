"""Objectives: the losses that an edit, or a co-trained model, is trained for, one family a file."""
