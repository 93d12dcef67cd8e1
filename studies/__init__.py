"""Holds the packaged study files."""
