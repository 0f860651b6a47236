"""Read data files into documents."""
