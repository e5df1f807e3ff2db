"""What runs on tokens: locate, store, archive, expand, attend.

One folder a family: `reference` is plain torch, `kernel` is Triton with the same signature.
`table` has both as one table.
"""

from vllm_kvpca.ops.attend.softmax import Partial, merge
from vllm_kvpca.ops.layer_codec import LayerCodec

__all__ = ["LayerCodec", "Partial", "merge"]
