"""What operators see: figures, metrics, the JSON route, archive times."""
