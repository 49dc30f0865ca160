"""One training loop (DeepSpeed), checkpoints, process groups, and how workers are started."""
