"""Small real models that need no model hub, converted once and ready for `vllm serve`."""
