"""Files of weights whatever the family: the manifest, checksums, whole folders, downloads, what callers name."""
