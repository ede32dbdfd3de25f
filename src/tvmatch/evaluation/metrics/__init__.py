"""Metrics as functions of features or points."""
