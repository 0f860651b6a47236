"""Filters: exact and near duplicates (deduplicate), and documents that contain evaluation texts (decontaminate)."""
