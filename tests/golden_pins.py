"""What decides how a CPU rounds, pinned; and a probe that tells whether two machines round alike.

Libraries choose their kernels by the processor: with AVX-512 a sum is taken in another order than with SSE.
Golden runs must give the same digits everywhere, so their processes start with the environment below. What an
environment cannot say stands in `pin_torch`.
"""

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

PINS = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own kernels: none of their AVX2 and AVX-512 builds
    "MKL_CBWR": "COMPATIBLE",  # torch's matrix products: MKL's one code path for all processors
    "MKL_DYNAMIC": "FALSE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # what torch still asks oneDNN for
    "OPENBLAS_CORETYPE": "Nehalem",  # numpy's matrix products and its LAPACK
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",  # numpy's own loops: of its baseline
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX,-AVX512F",  # libm's exp, log, sin: not fused
    "OMP_NUM_THREADS": "1",  # a thread more is another order of a sum
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
KEPT = ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")  # of the caller's environment; and PATH, but no more


def environment(root: Path, outside: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of golden runs of the checkout at `root`, made from the caller's (`outside`)."""
    here = Path(__file__).resolve().parent.parent
    found = {name: outside[name] for name in KEPT if name in outside}
    found |= PINS | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    found["PYTHONSAFEPATH"] = "1"  # the folder of the command may hold another checkout
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), outside.get("PATH", os.defpath)])
    found["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(root), str(here)]))
    if (root / ".venv").is_dir():
        found["TORCH_EXTENSIONS_DIR"] = str(root / ".venv" / "torch_extensions")
    return found


def pin_torch() -> None:
    """Keep torch in this process from asking oneDNN, which takes part or not by what the processor can do."""
    import torch

    torch.backends.mkldnn.enabled = False


def probe() -> dict[str, str]:
    """Compute a little of everything that runs compute; return a digest of its bits by kind of arithmetic."""
    import numpy as np
    import torch

    pin_torch()
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((2, 67, 67)).astype(np.float32)
    wide = a.astype(np.float64)
    found = {
        "numpy": [
            np.exp(a),
            np.log(np.abs(a)),
            np.tanh(b),
            a @ b,
            np.dot(a[0], b[0]),
            a.sum(),
            wide.sum(),
            np.exp(wide),
            np.sqrt(np.abs(b)),
            *np.linalg.svd(wide),
            *np.linalg.qr(b),
        ]
    }
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        found[name] = _network(torch.from_numpy(a).to(kind), torch.from_numpy(b).to(kind))
    numbers = [float(x) for x in a.reshape(-1)]
    found["libm"] = [
        [math.exp(x), math.sin(x), math.tanh(x), math.log(abs(x)), abs(x) ** 1.7] for x in numbers
    ]
    torch.manual_seed(3)
    found["random"] = [torch.randn(100).numpy(), torch.nn.functional.dropout(torch.ones(100), 0.3).numpy()]
    return {
        name: hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest()[:16]
        for name, parts in found.items()
    }


def _network(x, weight) -> list:
    """Return what a small network and a step of AdamW make of `x` and `weight` [67, 67], as fp32 arrays."""
    import torch
    from torch.nn import functional

    weight = weight.clone().requires_grad_()
    hidden = functional.layer_norm(functional.linear(x, weight), (67,))
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5).to(x.dtype)
    hidden = functional.silu(hidden) * functional.gelu(x) * scale
    heads = hidden[:, :64].reshape(1, 67, 4, 16).transpose(1, 2)
    seen = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    loss = functional.cross_entropy(seen.transpose(1, 2).reshape(67, 64).float(), torch.arange(67) % 64)
    loss.backward()
    gradient = weight.grad.float().clone()
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    optimizer.step()
    parts = [hidden, torch.softmax(hidden.float(), -1), torch.sin(x.float()), seen, loss, gradient, weight]
    return [part.detach().float().numpy() for part in parts]


if __name__ == "__main__":
    import json

    print(json.dumps(probe()))
