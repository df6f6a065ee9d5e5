"""What everything stands on: errors, files, the terminal; and the device: precision, memory, compiled networks."""
