"""Samples by number, drawn in parts and written to files that can be resumed."""
