"""Operators whose forward-mode rule in PyTorch is silently wrong: calls with a tangent raise an error.

Found by comparing tangents, and gradients through them, of all operators in `torch.testing`'s `op_db` (2.13)
with finite differences, and by reading PyTorch's table of derivatives:

- rules that treat saved results (a factorisation, batch statistics) as constants: the tangent is correct,
  gradients through it and second tangents are not;
- wrong rules: `cholesky_inverse`, `triangular_solve`;
- no rule, and a tangent of zero: Bessel and Airy functions, products by `scatter_reduce`, float8 products,
  and operators registered with `torch.library`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_pop_interpreter_stack,
)
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

_GRADIENTS = "PyTorch's gradients through its tangent are wrong"
_TANGENT = "PyTorch's tangent of it is wrong"
_ZERO = "PyTorch has no derivative of it and would return a tangent of zero"


class _Refusal(NamedTuple):
    """Why calls are refused, what to use instead, and which calls are concerned."""

    reason: str
    instead: str
    concerns: Callable[[Sequence[Any], dict[str, Any]], bool] = lambda arguments, options: True


def _is_training(arguments: Sequence[Any], options: dict[str, Any]) -> bool:
    """`training` is the sixth argument of every batch norm, and `use_input_stats` of instance norm."""
    named = options.get("training", options.get("use_input_stats"))
    return bool(named) if named is not None else len(arguments) < 6 or bool(arguments[5])


def _multiplies(arguments: Sequence[Any], options: dict[str, Any]) -> bool:
    """`scatter_reduce(input, dim, index, src, reduce)`."""
    return "prod" in (options.get("reduce"), *arguments[4:5])


_DETERMINANT = _Refusal(_GRADIENTS, "use the diagonal of torch.linalg.lu_factor(A) or cholesky(A)")
_SOLVE = _Refusal(_GRADIENTS, "use torch.linalg.lu_solve(*torch.linalg.lu_factor(A), B)")
_HOUSEHOLDER = _Refusal(_GRADIENTS, "use torch.linalg.qr, or products with I − τ v vᵀ")
_BATCH = _Refusal(_GRADIENTS, "use group_norm or layer_norm", _is_training)
_ALWAYS_BATCH = _BATCH._replace(concerns=lambda arguments, options: True)
_NO_RULE = _Refusal(_ZERO, "write it with other functions, or detach its input if zero is meant")

_OPERATORS = (OpOverload, OpOverloadPacket)

_REFUSED_NAMES: dict[str, _Refusal] = {
    **dict.fromkeys(
        ("det", "linalg_det", "_linalg_det", "logdet", "slogdet", "linalg_slogdet", "_linalg_slogdet"),
        _DETERMINANT,
    ),
    **dict.fromkeys(("linalg_solve", "linalg_solve_ex", "_linalg_solve_ex", "linalg_tensorsolve"), _SOLVE),
    **dict.fromkeys(("linalg_householder_product", "orgqr"), _HOUSEHOLDER),
    "cholesky_inverse": _Refusal(_TANGENT, "use torch.linalg.inv, or torch.cholesky_solve with an identity"),
    "triangular_solve": _Refusal(_TANGENT, "use torch.linalg.solve_triangular"),
    "native_layer_norm": _Refusal(_GRADIENTS, "use torch.nn.functional.layer_norm"),
    **dict.fromkeys(
        (
            "batch_norm",
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_batch_norm_impl_index",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "instance_norm",
        ),
        _BATCH,
    ),
    "_batch_norm_with_update": _ALWAYS_BATCH,
    "scatter_reduce": _NO_RULE._replace(concerns=_multiplies),
    **dict.fromkeys(
        (
            "special_airy_ai",
            *(f"special_bessel_{kind}{order}" for kind in "jy" for order in "01"),
            *(f"special_modified_bessel_{kind}{order}" for kind in "ik" for order in "01"),
            *(f"special_scaled_modified_bessel_k{order}" for order in "01"),
            "special_spherical_bessel_j0",
            "_scaled_mm",
        ),
        _NO_RULE,
    ),
}


def _spellings(name: str) -> Iterator[Callable[..., Any]]:
    """All Python callables of an operator: function, method, operator and its overloads."""
    for owner in (torch, torch.Tensor, torch._C._linalg, torch._C._special):  # type: ignore[attr-defined]
        if hasattr(owner, name):
            yield getattr(owner, name)
    operator = getattr(torch.ops.aten, name, None)  # some are not in every version
    if operator is not None:
        yield operator
        yield from (getattr(operator, overload) for overload in operator.overloads())


_REFUSED = {function: refusal for name, refusal in _REFUSED_NAMES.items() for function in _spellings(name)}


class RefuseWrongDerivatives(TorchFunctionMode):
    """Replaces or refuses calls of PyTorch's functions and methods, whatever name they are called by.

    Args:
        stand_ins: replacement of each function.
    """

    def __init__(self, stand_ins: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.stand_ins = stand_ins
        self.special = {F.multi_head_attention_forward, *stand_ins, *_REFUSED}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = {} if kwargs is None else kwargs
        if func not in self.special and type(func) not in _OPERATORS:
            try:
                return func(*args, **options)
            except RuntimeError as error:
                _explain(func, error)
                raise
        return self._call(func, args, options)

    def _call(self, func: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> Any:
        if func is F.multi_head_attention_forward and torch.compiler.is_compiling():
            # The compiler would put it into the graph as one call, in which nothing is replaced.
            torch._dynamo.graph_break("nn.MultiheadAttention in forward mode: not traced")
        if func in self.stand_ins:
            return self.stand_ins[func](*args, **options)
        if func in _REFUSED:
            _check(func, args, options)
        result = func(*args, **options)
        if isinstance(func, _OPERATORS) and not _is_builtin(func):
            _check_tangent(func, (args, options), result)
        return result


def refusing_functions() -> tuple[tuple[Any, str, Callable[..., Any]], ...]:
    """Modules, names and refusing functions for compiled code, where the mode would break the graph."""
    names = [(torch, name) for name in _REFUSED_NAMES]
    for module, prefix in ((torch.linalg, "linalg_"), (torch.special, "special_")):
        names += [(module, name.removeprefix(prefix)) for name in _REFUSED_NAMES if name.startswith(prefix)]
    found = [(module, name, getattr(module, name)) for module, name in names if hasattr(module, name)]
    return tuple((module, name, _refusing(function)) for module, name, function in found)


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        _check(function, arguments, options)
        return function(*arguments, **options)

    return call


def refuse_batch_statistics(name: str, *inputs: Tensor | None) -> None:
    """Refuse a norm with batch statistics if an input carries a tangent.

    Raises:
        NotImplementedError: naming `name`, if the tangent may be differentiated.
    """
    if hides_tangent(inputs) and _is_differentiated_again():
        _refuse(f"torch.nn.functional.{name}", _BATCH)


def refusing_script(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `call` of a TorchScript function or method, whose operators a `TorchFunctionMode` does not see."""

    def called(script: Any, *arguments: Any, **options: Any) -> Any:
        if forward_ad._current_level >= 0 and hides_tangent((arguments, options)):
            raise NotImplementedError(
                "TorchScript: its operators cannot be replaced or checked in forward mode; use the function "
                "or module that was scripted or traced"
            )
        return call(script, *arguments, **options)

    return called


def refuse_checkpoint() -> NoReturn:
    """Refuse `torch.utils.checkpoint` in forward mode, where PyTorch would fail with an unclear error."""
    raise NotImplementedError(
        "torch.utils.checkpoint does not work inside torch.func.jvp: switch it off (in diffusers by "
        "disable_gradient_checkpointing()), or write the network with tvmatch.dual, whose tangents can be "
        "recomputed"
    )


def hides_tangent(arguments: Any) -> bool:
    """Whether a tensor in (nested) arguments carries a tangent of the active forward-mode level."""
    if isinstance(arguments, Tensor):
        if forward_ad._current_level < 0:
            return False
        # The compiler supports neither transforms inside forward mode nor these functions.
        if not torch.compiler.is_compiling() and _is_wrapped_again(arguments):
            with temporarily_pop_interpreter_stack():
                return hides_tangent(torch._C._functorch.get_unwrapped(arguments))
        return forward_ad.unpack_dual(arguments).tangent is not None
    if isinstance(arguments, dict):
        return any(hides_tangent(argument) for argument in arguments.values())
    return isinstance(arguments, list | tuple) and any(hides_tangent(argument) for argument in arguments)


def _is_wrapped_again(x: Tensor) -> bool:
    """Whether the innermost transform is a `torch.func.vmap` or `grad` that wraps x."""
    levels = torch._C._functorch
    if not levels.is_functorch_wrapped_tensor(x):
        return False
    innermost = retrieve_current_functorch_interpreter()
    return innermost.key() != levels.TransformType.Jvp and levels.maybe_get_level(x) == innermost.level()


def _check(function: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]) -> None:
    refusal = _REFUSED[function]
    if not refusal.concerns(arguments, options) or not hides_tangent((arguments, options)):
        return
    if refusal.reason != _GRADIENTS or _is_differentiated_again():
        _refuse(function.__name__, refusal)


def _refuse(name: str, refusal: _Refusal) -> NoReturn:
    tangent = ", or torch.no_grad() if only the tangent is needed" if refusal.reason == _GRADIENTS else ""
    raise NotImplementedError(f"{name}: {refusal.reason}; {refusal.instead}{tangent}")


def _is_differentiated_again() -> bool:
    """Whether the tangent may be differentiated: by reverse mode, or by an outer forward mode."""
    if torch.is_grad_enabled():
        return True
    levels = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


def _explain(function: Callable[..., Any], error: RuntimeError) -> None:
    if "mutate a captured Tensor" in str(error):
        raise NotImplementedError(
            f"{function.__name__}: a tensor of the model is changed in place (running statistics of "
            "batch_norm(training=True) or instance_norm, a counter, a cache), which torch.func.jvp does not "
            "support; call eval() on that layer, use group_norm or layer_norm, or change it outside"
        ) from error


def _is_builtin(operator: OpOverload | OpOverloadPacket) -> bool:
    return operator.__module__.removeprefix("torch._ops.") in ("aten", "prim", "prims")


def _check_tangent(operator: OpOverload | OpOverloadPacket, inputs: Any, result: Any) -> None:
    """Refuse a floating-point result without a tangent if an input carries one."""
    outputs = result if isinstance(result, list | tuple) else (result,)
    outputs = [x for x in outputs if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    if outputs and hides_tangent(inputs) and not hides_tangent(outputs):
        raise NotImplementedError(
            f"{operator}: an operator registered with torch.library has no forward-mode rule, and PyTorch "
            "would return a tangent of zero; write it with PyTorch's functions, or detach its inputs if zero "
            "is meant"
        )
