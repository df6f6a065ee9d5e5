"""Around Cog's server: the bridge from `predict.py`, its schema, the supervisor, the proxy with its queue."""
