"""The study file: composed by Hydra, checked by pydantic."""
