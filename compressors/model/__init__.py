"""Read and write checkpoints, tell their families apart, and describe their structure."""
