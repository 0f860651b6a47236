"""The config: its keys and their limits, the YAML reader, and the sizes of the configured model."""
