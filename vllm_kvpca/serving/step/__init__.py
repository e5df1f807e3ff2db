"""What a worker does: the attention backend, the plan of a step, and running it."""
