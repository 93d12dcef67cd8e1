"""Lets `python -m search.cli` be `optuna-search`."""

from search.cli import main

main()
