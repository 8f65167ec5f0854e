"""Exporters: the model of a run in formats of other libraries; one file per format."""
