"""Files in the TVM authors' format, made by hand: pickles that rebuild objects from source code in them."""

import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class EasyDict(dict[str, Any]):
    """As `dnnlib.util.EasyDict`: a dict of attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    """Only its name is pickled. In a file it would execute `module_src`."""
    raise AssertionError("the tests never unpickle their own files")


class Persistent(nn.Module):
    """An object of which a pickle holds the source code. Of this one it would write the file `marker`."""

    marker = Path("marker")

    def __reduce__(self) -> tuple[Any, ...]:
        source = f"open({str(type(self).marker)!r}, 'w').close()"
        description = EasyDict(
            type="class",
            version=6,
            module_src=source,
            class_name=type(self).__name__,
            state=dict(self.__dict__),
        )
        return _reconstruct_persistent_obj, (description,)


def authors_network(tensors: dict[str, Tensor], **options: Any) -> Persistent:
    """Modules with these tensors under these names: persistent ones on the outside, plain ones within."""
    root = Persistent()
    root._init_kwargs = EasyDict(options)  # type: ignore[assignment]
    for name, tensor in tensors.items():
        module: nn.Module = root
        *path, leaf = name.split(".")
        for depth, part in enumerate(path):
            if part not in module._modules:
                module.add_module(part, Persistent() if depth == 0 else nn.Module())
            child = module._modules[part]
            assert child is not None
            module = child
        module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def authors_bytes(content: Any, protocol: int = 4) -> bytes:
    """The pickle that their code would write of `content`."""
    with _their_modules():
        return pickle.dumps(content, protocol)


@contextmanager
def _their_modules() -> Iterator[None]:
    """The names under which their classes are pickled, while they are pickled."""
    places = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    names = [name for place in places for name in (place.split(".")[0], place)]
    assert not any(name in sys.modules for name in names)
    before = {thing: thing.__module__ for thing in places.values()}
    try:
        sys.modules.update({name: ModuleType(name) for name in names})
        for place, thing in places.items():
            setattr(sys.modules[place], thing.__name__, thing)
            thing.__module__ = place
        yield
    finally:
        for name in names:
            del sys.modules[name]
        for thing, place in before.items():
            thing.__module__ = place


def storage_bytes(tensor: Tensor, *, zipped: bool) -> bytes:
    """What `torch.save` makes of a tensor's storage, which stands in a pickle of the tensor."""
    storage = torch.storage.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
    )
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
