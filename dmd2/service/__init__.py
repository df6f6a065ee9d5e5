"""The service: what Cog's server needs around the engine."""
