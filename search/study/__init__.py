"""Optuna studies: storage, trials, samplers, workers, and what people see of them."""
