"""Alignment: a source's distributions brought onto the pivot's tokens, without a neural network in sight."""
