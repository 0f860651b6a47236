"""What each job is told, what it asks for, and the files that start it."""
