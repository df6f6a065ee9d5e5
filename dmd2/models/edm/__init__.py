"""EDM's networks in pixel space: layers, network, their folders and the published pickles."""
