"""From a request to images: reading what callers give, the engine, batches, writing what comes out."""
