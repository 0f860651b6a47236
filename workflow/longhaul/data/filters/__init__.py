"""Duplicate removal and decontamination."""
