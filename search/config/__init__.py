"""Reads the study file: Hydra composes it, pydantic checks it."""
