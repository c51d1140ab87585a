"""Every layer beside its full-precision original, at the very input of the original.

The full-precision network runs, and each paired layer of the candidate is called with what its original was called
with, so its error is its own and nothing of the layers before it:

    d_l = q_l(u) - f_l(u)          f_l: full precision, q_l: the candidate's, u: what f_l is given

`evaluate.layer_errors` and the doctor look at these errors over the steps of a trajectory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.model.clock import clock_of
from stepquant.model.families import make_attention_explicit_, timestep_argument

__all__ = ["Pairs", "alone", "beside", "clock_following", "products", "reference_of", "still"]

Pairs = Mapping[str, tuple[nn.Module, nn.Module]]
"""Name -> (full-precision layer, the candidate's)."""

See = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Called with a layer's name, the full-precision layer, and the outputs q_l(u) and f_l(u)."""


def reference_of(full_precision: nn.Module) -> nn.Module:
    """A copy with the matmuls of attention as modules, as in a quantized model. It shares all tensors."""
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*full_precision.parameters(), *full_precision.buffers())
    }
    reference = copy.deepcopy(full_precision, shared)
    make_attention_explicit_(reference)
    return reference


def alone(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """One layer's output, without any hook that was put on it."""
    return layer.forward(*args, **kwargs)


@contextmanager
def beside(pairs: Pairs, see: See) -> Iterator[None]:
    """Inside, every call of a full-precision layer calls the candidate's with the same input and shows both to `see`.

    The candidate's clock must stand at the timestep of the call, see `clock_following`.
    Raises EvaluationError, from that call, for a layer whose output has another shape than its original's.
    """

    def hook_for(name: str, candidate: nn.Module) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            found = alone(candidate, args, kwargs)
            if not isinstance(found, Tensor) or found.shape != output.shape:
                raise EvaluationError(f"{name} gives {type(found).__name__} unlike full precision: other networks?")
            see(name, layer, found, output)

        return hook

    with ExitStack() as stack:
        for name, (exact, candidate) in pairs.items():
            stack.callback(exact.register_forward_hook(hook_for(name, candidate), with_kwargs=True).remove)
        yield


def products(found: Tensor, exact: Tensor) -> Tensor:
    """<q, f>, |q|^2, |f|^2 and |q - f|^2 over all values, `[4]` float64 on the CPU."""
    q, f = found.double(), exact.double()
    return torch.stack([(q * f).sum(), q.square().sum(), f.square().sum(), (q - f).square().sum()]).cpu()


@contextmanager
def still(*modules: nn.Module) -> Iterator[None]:
    """Inside, modules are in evaluation mode and no parameter asks for a gradient; afterwards as they were."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    asking = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for part, _ in modes:
        part.training = False
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def clock_following(reference: nn.Module, candidate: nn.Module) -> Iterator[None]:
    """Inside, calls of the reference set the candidate's clock, so that its layers can be called one by one."""
    clock = clock_of(candidate)
    with ExitStack() as stack:
        if clock is not None:
            argument, position = timestep_argument(reference)

            def follow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                clock.set(kwargs[argument] if argument in kwargs else args[position])

            handle = reference.register_forward_pre_hook(follow, with_kwargs=True)
            stack.callback(handle.remove)
        yield
