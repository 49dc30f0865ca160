"""qbrec: multimodal sequential recommendation over semantic IDs (Q-BERT4Rec, arXiv 2512.02474)."""

__version__ = "0.1.0"
