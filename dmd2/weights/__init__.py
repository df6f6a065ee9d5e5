"""Files of weights of any family: the manifest, checksums, atomic folders, downloads, files that callers name."""
