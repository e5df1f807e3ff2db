"""Figures of the documentation, made from evaluation records alone."""
