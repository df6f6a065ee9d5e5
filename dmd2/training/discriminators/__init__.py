"""What tells generated images from real ones: the fake score's head, projected discriminators."""
