"""Measures images: metrics, the feature networks and classifiers behind them, the samples that they are computed on."""
