"""What runs on tokens: store, archive, attend. `reference` is the torch implementation."""

from vllm_kvpca.kernels.layer_codec import LayerCodec
from vllm_kvpca.kernels.reference import archive, attend_archive, attend_new, attend_recent, store
from vllm_kvpca.kernels.softmax import Partial, merge

__all__ = [
    "LayerCodec",
    "Partial",
    "archive",
    "attend_archive",
    "attend_new",
    "attend_recent",
    "merge",
    "store",
]
