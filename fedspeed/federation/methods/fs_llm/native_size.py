"""The size of FederatedScope-LLM's own messages, to be shown beside the bytes that FedSpeed sends.

Its distributed mode sends each tensor as a pickle in base64, a string of a protobuf. Nothing is pickled here:
the size is that of the values alone in base64. What pickle, protobuf and gRPC add, and names, is not counted,
so the original sends somewhat more.
"""

import math
from collections.abc import Mapping, Sequence

VALUE_BYTES = {"fp32": 4, "fp16": 2}


def base64_bytes(shapes: Mapping[str, Sequence[int]], dtype: str) -> int:
    """Return the bytes of tensors, each of them in base64 (RFC 4648): 4 characters for each 3 bytes begun.

    Args:
        shapes: of the tensors that a client sends, by name. dtype: of their values, a key of VALUE_BYTES.
    """
    sizes = (math.prod(shape) * VALUE_BYTES[dtype] for shape in shapes.values())
    return sum(4 * -(-size // 3) for size in sizes)
