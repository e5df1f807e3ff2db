"""Encode tokens that leave the window, and write them into archive pages."""
