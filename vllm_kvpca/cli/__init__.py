"""The `vllm-kvpca` command. Torch, transformers and vLLM are imported inside functions only."""
