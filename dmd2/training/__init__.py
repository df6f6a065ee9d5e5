"""Training: losses, critics, one file a method (teacher, dmd, dmd2, gdd), data, and the loop they share."""
