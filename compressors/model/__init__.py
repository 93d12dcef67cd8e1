"""Checkpoints on disk and in memory, the families they belong to, and what they are made of."""
