"""Builds compressed checkpoints of language models: Checkpoint → Checkpoint."""
