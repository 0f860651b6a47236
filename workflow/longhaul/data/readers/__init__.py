"""Readers: from data files of any format to validated texts and conversations."""
