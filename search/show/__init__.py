"""Shows tables, plots and progress to people."""
