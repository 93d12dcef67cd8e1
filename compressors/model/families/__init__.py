"""Describe one model family per file: the file's name is the family's `model_type`."""
