"""One dry forward pass that writes down what every module, and every function that matters, makes of the images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {f"conv{transpose}{dims}d" for transpose in ("", "_transpose") for dims in (1, 2, 3)}
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "local_response_norm", "rms_norm", "normalize"}
# Softmax is missing on purpose: it normalises over the classes, and the classifier's own output is the layer.
NONLINEARITIES = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "glu"),
    *("sigmoid", "logsigmoid", "log_sigmoid", "hardsigmoid", "hardswish", "hardtanh", "tanh", "tanhshrink"),
    *("softplus", "softsign", "softshrink", "hardshrink", "threshold", "clamp", "clamp_min", "clip"),
}
POOLS = {"adaptive_avg_pool2d", "avg_pool2d", "mean", "amax"}
ACTIVATION_CLASSES = tuple(
    getattr(nn, name)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")
)


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile wrappers, which hide activations."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def first_tensor(output: Any) -> Tensor | None:
    """The output, or the first tensor of a tuple, list or dict."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None


def function_name(function: Callable[..., Any]) -> str:
    """The name of a torch function, in place or not: ``relu`` for both F.relu and Tensor.relu_."""
    return getattr(function, "__name__", "").rstrip("_")


def nth(name: str, use: int) -> str:
    """One of several uses of a function on the same tensor: ``relu``, ``relu#2`` and so on."""
    return name if use == 1 else f"{name}#{use}"


def first_argument(args: Sequence[Any], kwargs: dict[str, Any] | None) -> Any:
    """What a torch function is applied to."""
    return args[0] if args else (kwargs or {}).get("input")


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode, and each back in its own afterwards.

    The flag alone is set: a `train` method of the user's own may do more than that.
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, _ in modes:
            submodule.training = False
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@dataclass
class Call:
    """A module's output in the dry pass, or what functions then made of it."""

    module: str
    index: int
    after: tuple[str, ...] = ()
    kind: str = "block"
    shape: tuple[int, ...] = ()
    key: tuple[int, ...] = ()
    # The convolution or linear layer that this is a pre-activation of, up to norms.
    source: Call | None = None
    # On a convolution or linear layer: itself after the first non-linearity that follows it.
    activated: Call | None = None
    # Convolutions and linear layers in the module.
    holds: int = 0
    # How often functions were applied to the output, by their names.
    uses: Counter[str] = field(default_factory=Counter)

    @property
    def label(self) -> str:
        return "+".join((self.module or "output", *self.after)) + (f":{self.index}" if self.index else "")


class _Tracer(TorchFunctionMode):
    """Watches modules (by hooks) and functions (as a mode); keeps every tensor alive, so that identities are unique."""

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.names = {submodule: name for name, submodule in module.named_modules()}
        self.counts = dict.fromkeys(self.names, 0)
        self.running: list[tuple[nn.Module, Call, Call | None]] = []
        self.calls: list[Call] = []
        self.origins: dict[int, tuple[Call, int, Tensor]] = {}
        self.batch = len(images)
        self.input_key = _key(images)

    def origin(self, value: Any) -> Call | None:
        """What made a tensor, unless it was changed in place since."""
        found = self.origins.get(id(value))
        return found[0] if found and found[1] == _version(value) else None

    def record(self, call: Call, output: Tensor) -> None:
        self.origins[id(output)] = (call, _version(output), output)
        real = output.is_floating_point() or output.is_quantized
        if real and output.ndim >= 1 and output.shape[0] == self.batch and output.numel() > 0:
            call.shape, call.key = tuple(output.shape[1:]), _key(output)
            self.calls.append(call)

    def enter(self, submodule: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(self.names[submodule], self.counts[submodule])
        self.counts[submodule] += 1
        if isinstance(submodule, nn.modules.conv._ConvNd):
            call.kind = "conv"
        elif isinstance(submodule, nn.Linear) or type(submodule).__name__ == "Linear":
            call.kind = "linear"  # by its name, since a quantised one is no nn.Linear
        elif "pool" in type(submodule).__name__.lower():
            call.kind = "pool"
        self.running.append((submodule, call, self.origin(first_argument(args, kwargs))))

    def leave(self, submodule: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        _, call, origin = self.running.pop()
        output = first_tensor(result)
        if output is None:
            return
        made = self.origin(output)
        source = origin.source if origin else None
        if call.kind in ("conv", "linear"):
            call.source = call
        elif made is not None and made.source is not None and made.source.activated is None:
            # The norm, or a container that ends with it.
            call.source, call.kind = made.source, made.source.kind
        elif source is not None and source.activated is None:
            if "norm" in type(submodule).__name__.lower():
                call.source, call.kind = source, source.kind
            elif _is_activation(submodule):
                source.activated, call.kind = call, source.kind
        self.record(call, output)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function_name(function)
        origin = self.origin(first_argument(args, kwargs)) if name in NORMS | NONLINEARITIES | POOLS else None
        if origin is not None:
            origin.uses[name] += 1
        result = function(*args, **(kwargs or {}))
        if (name in CONVOLUTIONS or name == "linear") and self.running and not any(self.running[-1][0].children()):
            # A leaf that calls the function is such a layer, whatever its class.
            self.running[-1][1].kind = "linear" if name == "linear" else "conv"
        if (
            origin is not None
            and isinstance(result, Tensor)
            and not (self.running and _is_activation(self.running[-1][0]))
        ):
            call = Call(origin.module, origin.index, (*origin.after, nth(name, origin.uses[name])))
            source = origin.source
            if name in NORMS:
                call.source = source
                call.kind = source.kind if source else call.kind
            elif name in POOLS:
                if math.prod(result.shape[2:]) != 1 or result.numel() == first_argument(args, kwargs).numel():
                    return result  # only what pools whole feature maps is a layer
                call.kind = "pool"
            elif source is not None and source.activated is None:
                source.activated, call.kind = call, source.kind
            self.record(call, result)
        return result


def trace_forward(module: nn.Module, example: Tensor) -> list[Call]:
    """The calls of a dry forward pass whose output follows the batch, in the order of completion."""
    calls = _dry_pass(module, example, 2)
    # A first dimension that was 2 by chance (a weight's, of two classes) is 2 again.
    batched = {(call.label, call.shape) for call in _dry_pass(module, example, 3)}
    return [call for call in calls if (call.label, call.shape) in batched]


def _dry_pass(module: nn.Module, example: Tensor, batch: int) -> list[Call]:
    images = torch.cat([example[:1]] * batch)
    tracer = _Tracer(module, images)
    handles = []
    try:
        for submodule in tracer.names:
            handles.append(submodule.register_forward_pre_hook(tracer.enter, with_kwargs=True))
            handles.append(submodule.register_forward_hook(tracer.leave, with_kwargs=True))
        with torch.inference_mode(False), torch.no_grad(), eval_mode(module), tracer:
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return [call for call in tracer.calls if call.key != tracer.input_key]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _key(tensor: Tensor) -> tuple[int, ...]:
    """Equal for tensors that hold the same values in the same order (one storage, place, version), flattened or not."""
    strides = () if tensor.is_contiguous() else (*tensor.shape, *tensor.stride())
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.storage_offset(), tensor.numel(), _version(tensor), *strides)


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is one non-linearity: torch's own, or a leaf without weights that is called like one."""
    if isinstance(module, ACTIVATION_CLASSES):
        return True
    name = type(module).__name__.lower()
    leaf = not any(module.children()) and not any(True for _ in module.parameters(recurse=False))
    return (
        leaf
        and "softmax" not in name
        and any(stem in name for stem in ("elu", "silu", "swish", "mish", "sigmoid", "tanh"))
    )
