"""Filter out duplicates and documents that contain evaluation texts."""
