"""What a run costs: FLOPs, memory, energy, seconds."""

COST_FILE = "cost.json"
"""The cost of a run, in its folder"""
