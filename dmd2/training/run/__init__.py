"""One run in its folder: checkpoints, what it was made from, logs, signals, divergence, the model card."""
