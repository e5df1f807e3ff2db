"""Attention over archive, recent and new tokens."""
