"""Every place where vLLM is changed from outside."""
