"""Settings that make results independent of the processor, and a probe that compares how machines round.

Libraries choose their kernels by the processor: with AVX-512 a sum is taken in a different order than with
SSE. Golden runs must give the same digits everywhere, so their processes start with the environment below.
`pin_torch` makes the one setting that has no environment variable.
"""

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

PINS = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's kernels: no AVX2 or AVX-512 builds
    "MKL_CBWR": "COMPATIBLE",  # torch's matrix products: MKL's code path for all processors
    "MKL_DYNAMIC": "FALSE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # operations that torch delegates to oneDNN
    "OPENBLAS_CORETYPE": "Nehalem",  # numpy's matrix products and its LAPACK
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",  # numpy's loops: baseline
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX,-AVX512F",  # libm's exp, log, sin: no FMA
    "OMP_NUM_THREADS": "1",  # the number of threads changes the order of sums
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
INHERITED = ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")  # from the caller's environment, besides PATH


def environment(root: Path, outside: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of golden runs of the checkout at `root`.

    Args:
        outside: the caller's environment.
    """
    here = Path(__file__).resolve().parent.parent
    variables = {name: outside[name] for name in INHERITED if name in outside}
    variables |= PINS | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    variables["PYTHONSAFEPATH"] = "1"  # the folder of the command may hold another checkout
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), outside.get("PATH", os.defpath)])
    variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(root), str(here)]))
    if (root / ".venv").is_dir():
        variables["TORCH_EXTENSIONS_DIR"] = str(root / ".venv" / "torch_extensions")
    return variables


def pin_torch() -> None:
    """Disable oneDNN in torch in this process, because torch uses it only on some processors."""
    import torch

    torch.backends.mkldnn.enabled = False


def probe() -> dict[str, str]:
    """Compute a small example of each operation of runs and return a digest of the bits by kind of
    arithmetic.
    """
    import numpy as np
    import torch

    pin_torch()
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((2, 67, 67)).astype(np.float32)
    wide = a.astype(np.float64)
    arrays = {
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
        arrays[name] = _network(torch.from_numpy(a).to(kind), torch.from_numpy(b).to(kind))
    numbers = [float(x) for x in a.reshape(-1)]
    arrays["libm"] = [
        [math.exp(x), math.sin(x), math.tanh(x), math.log(abs(x)), abs(x) ** 1.7] for x in numbers
    ]
    torch.manual_seed(3)
    arrays["random"] = [torch.randn(100).numpy(), torch.nn.functional.dropout(torch.ones(100), 0.3).numpy()]
    return {
        name: hashlib.sha256(b"".join(np.asarray(one).tobytes() for one in computed)).hexdigest()[:16]
        for name, computed in arrays.items()
    }


def _network(x, weight) -> list:
    """Return activations, loss, gradient and updated weight of a small network and a step of AdamW on `x` and
    `weight` [67, 67], as fp32 arrays.
    """
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
