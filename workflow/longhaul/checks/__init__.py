"""Checks of nodes and of the network before training, and `longhaul verify` of stored files afterwards."""
