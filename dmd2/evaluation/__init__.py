"""Measures images: metrics, the feature networks and classifiers behind them, and the samples they are given."""
