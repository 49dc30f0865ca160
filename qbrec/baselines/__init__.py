"""Honest rivals in the box: popularity and a tuned ItemKNN, both over item rows alone."""

from qbrec.baselines.itemknn import ItemKNN
from qbrec.baselines.popularity import Popularity

__all__ = ["ItemKNN", "Popularity"]
