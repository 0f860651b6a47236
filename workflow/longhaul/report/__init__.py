"""Report: the tables of `plan`, the values and texts of `status` and `doctor`, and the HTML page; nothing here imports torch."""
