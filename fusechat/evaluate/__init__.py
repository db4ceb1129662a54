"""Evaluation that compares models of different tokenizers fairly, sample by sample, resumable."""
