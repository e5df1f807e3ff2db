"""Expand whole sequences in head space, for prefill attention."""
