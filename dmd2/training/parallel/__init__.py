"""A run on many devices: who has which rows of a batch, whose gradients are averaged, whose networks are sharded."""
