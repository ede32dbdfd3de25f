"""Custom extractors: any network or function that maps images to features."""

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
    """A custom callable as an `Extractor`. Its results are checked."""

    def __init__(self, name: str, function: Callable[[Tensor], Any], device: torch.device) -> None:
        self.name = name
        self.fingerprint = _fingerprint(name, function)
        self._device = device
        self._function = function

    def __call__(self, images: Tensor) -> Features:
        """Features of `images`, uint8 (B, 3, H, W).

        Raises:
            InputError: for images of another type or shape, or if the callable does not return features.
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
    """Load the extractor "package.module:attribute", from an installed package or the current folder.

    The attribute is an `nn.Module` or a function of one argument, images uint8 (B, 3, H, W) on `device`, that
    returns (B, d) or `Features`; or a class without arguments that creates one. A module is moved to `device`
    and put into evaluation mode.

    The fingerprint covers the name, the source of the function or class, and all tensors of a module. It does
    not cover functions or networks that a function uses: write an `nn.Module` in that case.

    Raises:
        InputError: if it cannot be imported or created, or is none of these.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError("extractor", f"must be package.module:attribute, got {name!r}")
    try:
        function = attrgetter(attribute)(import_module(module_name))
    except Exception as error:  # including errors of the user's code
        raise InputError("extractor", f"{name} cannot be imported: {one_line(error)}") from error
    if inspect.isclass(function):
        try:
            function = function()
        except Exception as error:  # from the user's code
            raise InputError("extractor", f"{name} cannot be created: {one_line(error)}") from error
    if not callable(function):
        raise InputError("extractor", f"{name} must be a module or a function, got {type(function).__name__}")
    if isinstance(function, nn.Module):
        function = function.to(device).eval()
    return CustomExtractor(name, function, device)


def _fingerprint(name: str, function: Callable[..., Any]) -> str:
    digest = hashlib.sha256(name.encode())
    try:
        digest.update(inspect.getsource(function if inspect.isroutine(function) else type(function)).encode())
    except (OSError, TypeError):  # builtins and definitions in an interactive session have no source
        digest.update(type(function).__qualname__.encode())
    if isinstance(function, nn.Module):
        for key, tensor in function.state_dict().items():
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{key} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
