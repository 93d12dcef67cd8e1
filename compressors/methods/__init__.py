"""Holds the methods of compression, a module for each."""
