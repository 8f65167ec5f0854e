"""What a run costs: FLOPs, memory, energy, seconds."""
