"""`python -m search.cli` is `optuna-search`."""

from search.cli import main

main()
