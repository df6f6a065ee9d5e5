"""What all folders use: errors, files, terminal; and the device: precision, memory, offload, compiled networks."""
