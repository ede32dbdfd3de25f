"""Tensors of a file, made only after the whole file is read and only within their storages."""

import math
from typing import Any

import torch
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.safe_pickle.inert import Inert

MAX_RANK, MAX_SIZE = 16, 1 << 48


class Storage(Inert):
    """Holds the `torch.storage.TypedStorage` that `torch.load` read, as its only argument."""


class StoredTensor(Inert):
    """A view of a storage; its arguments are those of `torch._utils._rebuild_tensor_v2`."""

    class_name = "Tensor"

    def tensor(self) -> Tensor:
        """The tensor, in the memory of its storage.

        Raises:
            InputError: if shape, strides and offset are not those of a tensor within the storage.
        """
        arguments: tuple[Any, ...] = (*self.arguments, None, None, None, None)
        storage, offset, shape, strides = arguments[:4]
        complete = isinstance(storage, Storage) and type(shape) is tuple and type(strides) is tuple
        if not complete or not len(shape) == len(strides) <= MAX_RANK:
            raise InputError("a damaged tensor")
        if not all(type(size) is int and 0 <= size < MAX_SIZE for size in (offset, *shape, *strides)):
            raise InputError("a tensor of impossible shape")
        if len(self.arguments) > 6:
            raise InputError("a tensor that is marked as negated, conjugated or otherwise special")
        (typed,) = storage.arguments
        numbers = torch.empty(0, dtype=typed.dtype, device="cpu").set_(typed)
        if 0 in shape:
            return numbers[:0].reshape(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if max(last + 1, math.prod(shape)) > len(numbers):  # the latter: a stride of 0 repeats numbers
            raise InputError(f"a tensor of shape {shape} in a storage of {len(numbers)} numbers")
        return numbers.as_strided(shape, strides, offset)
