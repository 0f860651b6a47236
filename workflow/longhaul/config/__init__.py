"""Config keys and their limits (run config and site file), the YAML reader, and the sizes of the configured model."""
