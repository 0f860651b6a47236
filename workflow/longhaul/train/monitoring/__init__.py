"""Monitoring: metrics.jsonl, experiment trackers, events and straggler detection."""
