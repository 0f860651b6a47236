"""Data files to checked documents."""
