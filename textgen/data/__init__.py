"""Corpora, token arrays on disk, the batches that a step sees, and synthetic tasks."""
