"""Evaluation of exported models with lm-evaluation-harness, offline."""
