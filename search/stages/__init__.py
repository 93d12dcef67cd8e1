"""The way of a trial, a file a stage."""
