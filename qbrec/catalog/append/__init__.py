"""Generations: items added to, changed in and retired from a finished catalogue."""
