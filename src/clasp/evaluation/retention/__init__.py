"""Retention of pre-trained features: probes before and after alignment, weight drift, weight interpolation."""
