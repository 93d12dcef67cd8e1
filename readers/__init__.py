"""Read JSON, YAML and text from outside, with limits on kind, size and depth."""
