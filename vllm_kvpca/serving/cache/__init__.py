"""What vLLM's scheduler knows: the two cache groups of a layer, their blocks, prefix hits."""
