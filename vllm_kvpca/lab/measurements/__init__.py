"""One module for each kind of measurement: its run, its comparison and the rows of its tables."""
