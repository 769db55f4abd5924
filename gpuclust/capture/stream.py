"""ActivationStream: a network's activations of wanted layers, handed out batch by batch at the moment they exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpuclust.arithmetic import full_precision
from gpuclust.capture.layers import Layer
from gpuclust.capture.trace import eval_mode, first_argument, first_tensor, function_name, nth, unwrap
from gpuclust.errors import InputError
from gpuclust.profile import named

Write = Callable[[Layer, Tensor], None]


class ActivationStream:
    """Forward passes through a network that hand out the activations of `layers` and stop after the last of them.

    Inside the ``with`` block every submodule is in eval mode and the hooks are installed; afterwards, whatever
    happened, each submodule is in its own mode again and the hooks are gone.

    Parameters
    ----------
    module
        The network; DataParallel and torch.compile wrappers are looked through.
    layers
        What `find_layers` found in the same network, in any order.

    Notes
    -----
    `write` runs inside the hook: a non-linearity that works in place overwrites the activation right afterwards, so
    the callee copies it at once. Gradients are off by ``no_grad``, not by ``inference_mode``: tensors that a
    network caches on itself during a pass (masks, position tables) must stay usable for training. A pass does not
    depend on the caller's settings: autocast is off, matrix products and convolutions are in full float32 (no
    TF32), cuDNN is deterministic and does not benchmark.
    """

    def __init__(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        self.module = unwrap(module)
        self.layers = tuple(layers)
        self._stack = ExitStack()
        self._pass: _Pass | None = None
        self._entered = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.module))
            for name in dict.fromkeys(layer.module for layer in self.layers):
                try:
                    submodule = self.module.get_submodule(name)
                except AttributeError:
                    raise InputError(f"{type(self.module).__name__} has no module {name!r} to capture") from None
                stack.callback(submodule.register_forward_hook(self._hook(name)).remove)
            self._stack = stack.pop_all()
        self._entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self._entered = False
        self._stack.close()

    @named("forward")
    def forward(self, images: Tensor, write: Write) -> None:
        """One pass: calls ``write(layer, activation)`` once for every layer, in the order of the forward pass.

        Parameters
        ----------
        images
            One batch ``(b, c, h, w)`` on the network's device.
        write
            Receives the activation ``(b, *layer.shape)`` as it is at that moment; it must copy before it returns.

        Raises
        ------
        InputError
            If a layer was not reached or came in another shape than `find_layers` saw.
        """
        if not self._entered:
            raise RuntimeError("ActivationStream.forward is called inside the stream's with block")
        self._pass = running = _Pass(self.layers, len(images), write)
        try:
            with ExitStack() as stack:
                stack.enter_context(full_precision(images.device))
                if any(layer.after for layer in self.layers):
                    stack.enter_context(running)
                self.module(images)
        except _Stop:
            return
        finally:
            self._pass = None
        missing = [f"{layer.name} ({layer.module}, call {layer.call})" for layer in running.wanted.values()]
        if missing:
            raise InputError(
                f"the forward pass of {type(self.module).__name__} ended without {', '.join(missing[:5])}: the network "
                "takes another way for these images than for the example its layers were listed with; leave them out "
                "with --layers"
            )

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(submodule: nn.Module, args: Any, output: Any) -> None:
            if self._pass is not None:
                self._pass.arrive(name, output)

        return hook


class _Stop(BaseException):
    """Ends a forward pass after the last wanted layer; no `except Exception` of a network may catch it."""


@dataclass(eq=False)
class _Pending:
    """An output on its way through the functions that a layer is captured after, and those still to come."""

    tensor: Tensor
    layer: Layer
    rest: list[str]
    uses: int = 0

    def is_next(self, name: str) -> bool:
        """Whether a function of that name, applied to the tensor now, is the next on the way; counts its uses."""
        if self.rest[0].partition("#")[0] != name:
            return False
        self.uses += 1
        return self.rest[0] == nth(name, self.uses)


class _Pass(TorchFunctionMode):
    """The state of one forward pass; entered as a mode only where a layer is captured after a function."""

    def __init__(self, layers: Sequence[Layer], batch: int, write: Write) -> None:
        super().__init__()
        self.batch = batch
        self.write = write
        self.wanted = {(layer.module, layer.call, layer.after): layer for layer in layers}
        self.calls = dict.fromkeys((layer.module for layer in layers), 0)
        self.pending: list[_Pending] = []

    def arrive(self, module: str, output: Any) -> None:
        call = self.calls[module]
        self.calls[module] += 1
        tensor = first_tensor(output)
        if tensor is None:
            return
        ready = [layer for layer in self.wanted.values() if layer.module == module and layer.call == call]
        for layer in ready:
            if layer.after:
                self.pending.append(_Pending(tensor, layer, layer.after.split("+")))
            else:
                self.deliver(layer, tensor)
        self.stop_if_done()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.pending:
            name, source = function_name(function), first_argument(args, kwargs)
            moving = [step for step in self.pending if step.tensor is source and step.is_next(name)]
            if moving:
                self.pending = [step for step in self.pending if not any(step is other for other in moving)]
                for step in moving:
                    if len(step.rest) > 1:
                        self.pending.append(_Pending(result, step.layer, step.rest[1:]))
                    else:
                        self.deliver(step.layer, result)
                self.stop_if_done()
        return result

    def deliver(self, layer: Layer, activation: Tensor) -> None:
        if tuple(activation.shape) != (self.batch, *layer.shape):
            advice = (
                "all images need the size that the layers were listed with"
                if self.batch > 1
                else "a network that squeezes takes no single image: choose a --batch-size that leaves none over"
            )
            raise InputError(
                f"{layer.name} ({layer.module}) was listed with shape {layer.shape} per image; {_images(self.batch)} "
                f"gave {tuple(activation.shape)}: {advice}"
            )
        del self.wanted[layer.module, layer.call, layer.after]
        with named(f"store {layer.name}"):
            self.write(layer, activation)

    def stop_if_done(self) -> None:
        if not self.wanted:
            raise _Stop


def _images(count: int) -> str:
    return "a single image" if count == 1 else f"a batch of {count} images"
