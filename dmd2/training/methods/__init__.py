"""One file a method: what is minimised. None knows the family of the networks."""
