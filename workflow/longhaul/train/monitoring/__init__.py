"""Monitoring: metrics.jsonl, experiment trackers, events, straggler detection, and profiles of steps."""
