"""Metrics, trackers, events and stragglers."""
