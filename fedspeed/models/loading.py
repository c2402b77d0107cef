"""Loading of a model's weights, one decoder block at a time, so that no rank ever needs memory for the whole
model.

The model is built on the meta device, the adapter is added, and then each unit (a block, the embedding, the
head) is read and handed to `place`, which keeps, copies or partitions it, before the next one is read.
"""

import math
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from fedspeed import activity
from fedspeed.errors import ModelError
from fedspeed.models.adapter_keys import check_keys, names_in_files
from fedspeed.models.adapters import add_adapter, base_name, initial_adapter, is_adapter, portable_name
from fedspeed.models.base_files import base_shape, fit
from fedspeed.models.blocks import units
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.families.registry import FAMILIES, family_of
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.hub import model_folder
from fedspeed.models.meta_device import move_buffers, on_meta_device
from fedspeed.models.saved_adapter import WEIGHTS_FILE
from fedspeed.models.stored import BASE_FILE, FLOATS, check_types, stored_tensors
from fedspeed.units import shortened_list

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

# Device that draws the weights of `model.init=random`. Benchmarks choose the GPU, since a CPU draws bf16 with
# one thread. Its draws depend on the kind of GPU, though, and all ranks of a federation need the same base.
draw_device = "cpu"
_GROUPED_FROM = (8, 0)  # CUDA compute capability from which torch has products grouped by expert: Ampere

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED_TYPES = {name: {**DTYPES, "fp64": torch.float64}[dtype] for name, dtype in FLOATS.items()}


# Parameter -> its names in the files.
Keys = Mapping[str, tuple[str, ...]]


class WeightFiles:
    """The safetensors of one folder, read tensor by tensor.

    Args:
        keys: parameter -> its name in the files, where that differs. Several names: its rows, over all
            dimensions but the last, are divided among as many matrices.

    Raises:
        ModelError: the files are missing or damaged.
    """

    def __init__(self, folder: Path, single: str = BASE_FILE, keys: Keys | None = None):
        self._folder = folder
        self._stored = stored_tensors(folder, single)
        self._keys = keys or {}

    def names(self) -> set[str]:
        """Return the names of all tensors in the files."""
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the files."""
        return self._stored[name].shape

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Read a tensor.

        Raises:
            ModelError: it is not there, has another shape or another kind of type, or cannot be read.
        """
        self.check(name, shape)
        keys = self._keys.get(name, (name,))
        with ExitStack() as opened:
            if len(keys) == 1:
                return self._read(keys[0], {}, opened)
            types = (_STORED_TYPES[self._stored[key].dtype] for key in keys)
            whole = torch.empty(shape, dtype=reduce(torch.promote_types, types))
            files: dict[Path, Any] = {}
            for part, key in zip(whole.view(-1, shape[-1]).chunk(len(keys)), keys, strict=True):
                part.copy_(self._read(key, files, opened))
            return whole

    def _read(self, key: str, files: dict[Path, Any], opened: ExitStack) -> torch.Tensor:
        """Read one tensor of the files, and keep its file open in `files` until `opened` ends."""
        path = self._stored[key].file
        try:
            if path not in files:
                files[path] = opened.enter_context(safe_open(path, framework="pt"))
            return files[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {key} cannot be read ({error}); copy the file again") from error

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise what `read` would raise, without reading the tensor."""
        keys = self._keys.get(name, (name,))
        expected = tuple(shape)
        if len(keys) > 1:
            expected = (math.prod(shape[:-1]) // len(keys), shape[-1])
        for key in keys:
            if key not in self._stored:
                raise ModelError(
                    f"{self._folder}: no weight named {key}; the files belong to another architecture than "
                    "config.json"
                )
            stored = self._stored[key]
            check_types([(key, stored)])
            if stored.shape != expected:
                raise ModelError(
                    f"{stored.file}: {key} has shape {stored.shape}, config.json asks for {expected}"
                )


# Ways to compute attention that are part of torch; transformers loads others, by their names, from the hub.
_ATTENTION = (None, "eager", "sdpa")
_REFUSED_BY_TRANSFORMERS = (ValueError, TypeError, LookupError, OSError, StrictDataclassError)


def model_config(base: str) -> "PreTrainedConfig":
    """Return transformers' configuration of a base, which may not bring code of its own.

    Args:
        base: a folder, or a hub name.

    Raises:
        ModelError: its attention is computed by code from elsewhere.
    """
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if found._attn_implementation not in _ATTENTION:
        raise ModelError(
            f"{base}: config.json has attn_implementation={str(found._attn_implementation)[:99]!r}, which "
            "is code from elsewhere; remove that key"
        )
    return found


def meta_model(config: ModelConfig, adapter: AdapterConfig) -> "PreTrainedModel":
    """Build the model with its adapter on the meta device, where tensors take no memory, in the dtype of the
    run, which must have been decided.

    Raises:
        ModelError: config.json is missing or describes no model of FAMILIES, or the adapter does not fit it.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(config.base, config.init == "pretrained")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json; model.base must be a Hugging Face model folder")
    try:
        hf = model_config(str(folder))
    except _REFUSED_BY_TRANSFORMERS as error:
        raise ModelError(f"{path}: not a model configuration transformers knows ({error})") from error
    family = family_of(hf.model_type, str(path))
    if (hf.pad_token_id or 0) >= hf.vocab_size:
        hf.pad_token_id = None  # a pad token beyond the vocabulary needs no embedding: padding is masked
    shape = base_shape(folder, config.init == "pretrained")
    hf.tie_word_embeddings = shape.tied
    if family.stacked:
        hf._experts_implementation = experts_implementation()
    try:
        with on_meta_device():
            model = AutoModelForCausalLM.from_config(hf, dtype=DTYPES[config.dtype], trust_remote_code=False)
    except _REFUSED_BY_TRANSFORMERS as error:
        raise ModelError(
            f"{path}: transformers builds no model of it ({type(error).__name__}: {error}); correct the "
            "value that it names"
        ) from error
    move_buffers(model)
    _check_parameters(model, shape, path)
    model.config.use_cache = False  # training does not need the cache, which keeps keys and values
    with on_meta_device():
        model = add_adapter(model, adapter)
    return model


def experts_implementation() -> str:
    """Return how transformers shall compute experts on this machine's cards.

    "grouped_mm", its own default, is one product whose rows are grouped by expert. It adds up a token's
    experts in a fixed order, and in bf16 the host waits for nothing. The others are worse: "eager", a loop
    over experts, makes the host wait for the device several times an expert, and "batched_mm" copies an
    expert's weights for each of its tokens. But for cards before Ampere, transformers replaces the grouped
    product by one of its own, which computes and stores the gradient of all experts, although they are
    frozen: there the loop is the better one.
    """
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < _GROUPED_FROM
    return "eager" if old else "grouped_mm"


def _check_parameters(model: nn.Module, shape: ModelShape, path: Path) -> None:
    """Compare the parameters that a family describes with those of the model that transformers builds.

    Raises:
        ModelError: they differ, so that the family's module does not know this model as it is.
    """
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    described = dict(FAMILIES[shape.family].parameters(shape))
    names = sorted(name for name in built | described if built.get(name) != described.get(name))
    if names:
        example = f"{described.get(names[0])} instead of {built.get(names[0])}"
        raise ModelError(
            f"{path}: models/families/{shape.family}.py describes other parameters than transformers builds: "
            f"{shortened_list(names, 3)} ({example}); correct the family"
        )


Place = Callable[[str, nn.Parameter], nn.Parameter]
_Entry = tuple[str, nn.Module, str, nn.Parameter]


def materialise(
    model: "PreTrainedModel",
    config: ModelConfig,
    adapter: AdapterConfig,
    seed: int,
    place: Place,
    *,
    only: Container[nn.Parameter] | None = None,
) -> None:
    """Give every parameter of a meta model its value. Tied parameters stay tied, and buffers, such as rotary
    frequencies, are computed.

    Args:
        seed: of the run, for weights that are drawn.
        place: called with (name, parameter), returns the parameter that the model shall have instead.
        only: parameters that this rank needs; the others are not read and stay on the meta device. None: all.

    Raises:
        ModelError: the files do not hold the model that config.json describes.
    """
    inner, files, started = _sources(model, config, adapter)
    placed: dict[nn.Parameter, nn.Parameter] = {}  # meta parameter -> the one with a value
    for unit_name, unit, recurse in activity.counted(
        list(units(model)), "the loading of the base" if files else "the drawing of weights", "part"
    ):
        entries = list(_parameters(unit_name, unit, recurse))
        fresh = [e for e in entries if e[3] not in placed and (only is None or e[3] in only)]
        if not fresh and only is not None and not any(e[3] in placed for e in entries):
            continue
        if files is None:
            _draw(inner, unit, recurse, fresh, seed ^ zlib.crc32(base_name(unit_name).encode()))
        for name, parent, leaf, meta in fresh:
            if is_adapter(name):
                value = (
                    started.read(portable_name(name), meta.shape)
                    if started
                    else initial_adapter(name, meta.shape, seed)
                )
            else:
                value = files.read(base_name(name), meta.shape) if files else getattr(parent, leaf).data
            placed[meta] = place(
                name, nn.Parameter(_cast(name, value, meta.dtype), requires_grad=meta.requires_grad)
            )
        for _, parent, leaf, meta in entries:  # a tied parameter gets what its first name got
            setattr(parent, leaf, placed.get(meta, meta))
    _compute_buffers(model, inner)
    left = [
        n
        for n, t in [*model.named_parameters(), *model.named_buffers()]
        if t.is_meta and (only is None or t in only)
    ]
    assert not left, f"tensors without a value: {left}"


def check_weights(model: "PreTrainedModel", config: ModelConfig, adapter: AdapterConfig) -> None:
    """Raise the ModelError that `materialise` would raise about the files, without reading a weight."""
    _, files, _ = _sources(model, config, adapter)
    for name, meta in model.named_parameters():
        if not is_adapter(name) and files:
            files.check(base_name(name), meta.shape)


def _sources(
    model: "PreTrainedModel", config: ModelConfig, adapter: AdapterConfig
) -> tuple["PreTrainedModel", WeightFiles | None, WeightFiles | None]:
    """Return (the model without its adapter, the files of its weights, the file of the adapter's); None for
    what is drawn. The adapter's file holds exactly the tensors of the model's adapter.
    """
    inner = cast("PeftModel", model).get_base_model() if adapter.method == "lora" else model
    inner = cast("PreTrainedModel", inner)
    files = None
    if config.init == "pretrained":
        base = model_folder(config.base)
        shapes = {
            base_name(name): tuple(p.shape) for name, p in model.named_parameters() if not is_adapter(name)
        }
        files = WeightFiles(
            base, keys=fit(stored_tensors(base), shapes, FAMILIES[inner.config.model_type], base).keys
        )
    if not adapter.start_from:
        return inner, files, None
    folder = Path(adapter.start_from)
    started = WeightFiles(folder, WEIGHTS_FILE)
    wanted = {
        portable_name(name): parameter.shape
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    check_keys(folder, started, wanted, names_in_files(model, FAMILIES[inner.config.model_type]), files)
    return inner, files, started


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a value to the run's type.

    Raises:
        ModelError: it exceeds the range of the type, as often in fp16 what was trained in bf16.
    """
    converted = value.to(dtype)
    if (
        dtype == torch.float16
        and value.dtype != dtype
        and not torch.equal(converted.isfinite(), value.isfinite())
    ):
        raise ModelError(
            f"{name}: has values up to {value.abs().max().item():.3g}, and fp16 ends at 65504; set "
            "model.dtype=bf16 or fp32"
        )
    return converted


def _parameters(unit_name: str, unit: nn.Module, recurse: bool) -> Iterator[_Entry]:
    """Yield (full name, module, attribute, parameter) of a unit's parameters."""
    for name, module in unit.named_modules() if recurse else [("", unit)]:
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            yield ".".join(filter(None, (unit_name, name, leaf))), module, leaf, parameter


def _draw(
    inner: "PreTrainedModel", unit: nn.Module, recurse: bool, fresh: Sequence[_Entry], seed: int
) -> None:
    """Fill a unit's weights by the model's own initialisation, from a seed that depends only on the run's and
    the unit's name. They stay on `draw_device` until `place` moves them.
    """
    for _, parent, leaf, meta in fresh:
        drawn = torch.empty(meta.shape, dtype=meta.dtype, device=draw_device)
        setattr(parent, leaf, nn.Parameter(drawn, requires_grad=meta.requires_grad))
    with torch.random.fork_rng(devices=[0] if draw_device == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        if fresh:
            for name, module in unit.named_modules() if recurse else [("", unit)]:
                if ".lora_" not in f".{name}":  # an adapter must not shift the draws of the base
                    inner._init_weights(module)


def _compute_buffers(model: nn.Module, inner: "PreTrainedModel") -> None:
    """Compute the buffers that are on the meta device by transformers' own initialisation: in the supported
    families they are functions of the configuration. Parameters keep their values.
    """
    for module in model.modules():
        buffers = list(module.named_buffers(recurse=False))
        if any(buffer.is_meta for _, buffer in buffers):
            for name, buffer in buffers:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
            with _kept(list(module.parameters(recurse=False))):
                inner._init_weights(module)


@contextmanager
def _kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let transformers' initialisation pass over some parameters, by the flag that it looks at."""
    for parameter in parameters:
        setattr(parameter, "_is_hf_initialized", True)
    try:
        yield
    finally:
        for parameter in parameters:
            delattr(parameter, "_is_hf_initialized")
