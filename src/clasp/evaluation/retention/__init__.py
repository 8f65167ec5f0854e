"""What the towers of a run still know: probes before and after alignment, drift, and the way between."""
