"""The way of a trial, a file a stage."""

BASE = "baseline"  # the last stage of a trial that is the base model itself, which is not measured again
