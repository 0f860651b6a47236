"""Checks of nodes, network and stored files."""
