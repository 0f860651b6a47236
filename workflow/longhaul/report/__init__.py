"""Prints a plan, and writes the HTML report of a finished run. Nothing here imports torch."""
