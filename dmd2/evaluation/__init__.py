"""What judges images: metrics, the networks they look through, the samples they look at."""
