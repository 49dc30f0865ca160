"""Honest rivals in the box, over item rows alone: popularity, a tuned ItemKNN, SASRec and BERT4Rec.

The last two are trained, each by a stage of its own (`baselines.stage`) that a run has where its evaluation
names them.
"""

from qbrec.baselines.itemknn import ItemKNN
from qbrec.baselines.popularity import Popularity

__all__ = ["ItemKNN", "Popularity"]
