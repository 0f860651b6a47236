"""Brings what a config names from elsewhere, and pins it."""
