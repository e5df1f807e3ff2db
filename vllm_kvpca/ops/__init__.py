"""What runs on tokens: store, archive, gather, attend.

`reference` is all of it in torch. store, archive, gather (and decode) are Triton kernels with
the same signatures, one family a file; they are imported by name, where Triton is installed.
Functions are not re-exported here: `ops.store` would be a function or, once somebody has
imported it, the module.
"""

from vllm_kvpca.ops.attend.softmax import Partial, merge
from vllm_kvpca.ops.layer_codec import LayerCodec

__all__ = ["LayerCodec", "Partial", "merge"]
