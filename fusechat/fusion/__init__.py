"""Fusion: train a target from the pivot's weights on what the sources know."""
