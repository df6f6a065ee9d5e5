"""Where batches come from: sets of images, noise-image pairs, what EDM does to images before training."""
