"""The pipeline: all stages of an experiment in order."""
