"""Figures as functions of features or points; none knows of models or files."""
