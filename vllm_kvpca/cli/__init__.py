"""The `vllm-kvpca` command. Modules here import torch, transformers and vLLM inside functions only."""
