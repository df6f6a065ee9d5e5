"""What is put on a loaded model: LoRAs and what users call them, ControlNets, T2I-Adapters."""
