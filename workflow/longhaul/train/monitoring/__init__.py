"""Metrics, experiment trackers, events and straggler detection of a training."""
