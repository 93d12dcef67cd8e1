"""What every trial of a study shares, prepared once and checked before anything is written."""
