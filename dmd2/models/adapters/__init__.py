"""Adapters, which change what a loaded model generates: LoRAs and how users name them, ControlNet, T2I-Adapter."""
