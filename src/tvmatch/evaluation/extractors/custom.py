"""Extractors of the user's own: any network or function that maps images to features."""

import hashlib
import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tvmatch.errors import InputError
from tvmatch.evaluation.extractors.base import Features, check_images, full_float32, one_line
from tvmatch.user_modules import import_module


class CustomExtractor:
    """A callable of the user's own, with its results checked."""

    def __init__(self, name: str, function: Callable[[Tensor], Any], device: torch.device) -> None:
        self.name = name
        self.fingerprint = _fingerprint(name, function)
        self._device = device
        self._function = function

    def __call__(self, images: Tensor) -> Features:
        """Features of `images`, uint8 (B, 3, H, W).

        Raises:
            InputError: for images of another type or shape, or if what the callable returns is not features.
        """
        check_images(images)
        with full_float32(self._device):
            result = self._function(images.to(self._device))
        features = result if isinstance(result, Features) else Features(result, None, None)
        return Features(
            self._checked("pooled", features.pooled, len(images)),
            None if features.spatial is None else self._checked("spatial", features.spatial, len(images)),
            None if features.logits is None else self._checked("logits", features.logits, len(images)),
        )

    def _checked(self, what: str, values: Any, count: int) -> Tensor:
        if not isinstance(values, Tensor):
            raise InputError("extractor", f"{self.name} must return tensors, got {type(values).__name__}")
        if values.ndim != 2 or len(values) != count or values.shape[1] < 1:
            raise InputError(
                "extractor",
                f"{self.name} must return {what} features of shape ({count}, d), got {tuple(values.shape)}",
            )
        return values.detach().to("cpu", torch.float32)


def load_custom(name: str, device: torch.device) -> CustomExtractor:
    """The extractor at `name`, "package.module:attribute", looked for among installed packages and here.

    The attribute is a module or function of one argument, images uint8 (B, 3, H, W) on `device`, that
    returns (B, d) or `Features`; or a class or function without arguments that makes one. A module is put
    on `device` and in evaluation mode.

    Its fingerprint covers the name, the source text of the function or class, and all tensors of a module.
    It does not see further functions or networks that a function uses: make such a thing an `nn.Module`.

    Raises:
        InputError: it cannot be imported or made, or is none of these.
    """
    function = _imported(name)
    if inspect.isclass(function) or (inspect.isroutine(function) and not _arguments(name, function)):
        try:
            function = function()
        except Exception as error:  # the user's own code
            raise InputError("extractor", f"{name} could not be made: {one_line(error)}") from error
    if not callable(function) or inspect.isclass(function):
        raise InputError("extractor", f"{name} must be a module or a function, got {type(function).__name__}")
    if not isinstance(function, nn.Module) and _arguments(name, function) != 1:
        raise InputError("extractor", f"{name} must take one argument, images")
    return CustomExtractor(
        name, function.to(device).eval() if isinstance(function, nn.Module) else function, device
    )


def _imported(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError("extractor", f"must be package.module:attribute, got {name!r}")
    try:
        return attrgetter(attribute)(import_module(module_name))
    except Exception as error:  # of the user's own code as well
        raise InputError("extractor", f"{name} cannot be imported: {one_line(error)}") from error


def _arguments(name: str, function: Callable[..., Any]) -> int:
    """Number of arguments that a callable must be given; one that does not tell is taken to need one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is p.empty and p.kind not in variadic for p in parameters)


def _fingerprint(name: str, function: Callable[..., Any]) -> str:
    digest = hashlib.sha256(name.encode())
    try:
        digest.update(inspect.getsource(function if inspect.isroutine(function) else type(function)).encode())
    except (OSError, TypeError):  # builtins, and what was typed into an interpreter
        digest.update(type(function).__qualname__.encode())
    if isinstance(function, nn.Module):
        for key, tensor in function.state_dict().items():
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{key} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
