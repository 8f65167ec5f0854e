"""Names of files in a run folder, for modules without torch too."""

LOG_FILE, RESULTS_FILE = "log.jsonl", "results.jsonl"
STATE_FOLDER = "state"
STATE_NAMES = ("state.safetensors", "previous.safetensors")
"""In the state folder, the newest first"""
PLAN_FILE = "plan.json"
"""Of a run with ``[auto]``: what was tried, and whether it is finished"""
