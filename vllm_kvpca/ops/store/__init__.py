"""Write raw tokens into recent pages."""
