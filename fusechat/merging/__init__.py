"""Merging: several targets of one shape -> one model, in parameter space."""
