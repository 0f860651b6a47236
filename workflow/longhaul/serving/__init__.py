"""Servers of exported models: how each inference engine is started, and the check of a served export."""
