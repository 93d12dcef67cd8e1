"""Searches for the best compressed version of a language model with Optuna."""
