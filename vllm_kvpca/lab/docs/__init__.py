"""Pages and files made from code and records; each command has --check."""
