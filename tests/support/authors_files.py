"""Files in the TVM authors' format, made by hand: pickles that rebuild objects from source code in them."""

import contextlib
import copy
import functools
import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
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


# A whole run's configuration, in their words. Where its values are used, they are interpolated too.
CONFIGURATION: dict[str, Any] = {
    "seed": 0,
    "loss": {
        "cfg": 2.0,
        "label_dropout": 0.1,
        **{"s_P_mean": -0.4, "s_P_std": 1.0, "gap_P_mean": -0.8, "gap_P_std": 1.0},
        "schedule": [1, 2.5, None, "${seed}", {"deep": ["${loss.cfg}"]}],
    },
    "encoder": {
        "vae_name": "stabilityai/sd-vae-ft-ema",
        "final_std": 1.0,
        "raw_mean": [0.86488, -0.27787343, 0.21616915, 0.3738409],
        "raw_std": [4.85503674, 5.31922414, 3.93725398, 3.9870003],
    },
    "network": {
        "do_scale_param": True,
        "data_type": "${training.precision}",
        "model_kwargs": {"depth": 28, "cfg": "${loss.cfg}", "norms": ["rms", "qk"], "size": "???"},
    },
    "training": {"ema_beta": 0.9999, "ema_target_beta": 0.99, "precision": "bfloat16", "clip": None},
}


def changed(**values: Any) -> dict[str, Any]:
    """`CONFIGURATION` with other values under dotted names, `loss__cfg` for loss.cfg; ... leaves one out."""
    content: dict[str, Any] = copy.deepcopy(CONFIGURATION)
    for name, value in values.items():
        section, leaf = name.split("__")
        content[section][leaf] = value
        if value is ...:
            del content[section][leaf]
    return content


def wrapper(tensors: dict[str, Tensor], configuration: Any = None, **state: Any) -> Persistent:
    """Their network in its wrapper, which remembers a part of the configuration.

    Args:
        tensors: under their names, without the wrapper's own level.
        configuration: of the run; by default `CONFIGURATION`.
        state: of the wrapper, on top of what it has in their files; ... leaves an attribute out.
    """
    made = OmegaConf.create(CONFIGURATION if configuration is None else configuration)
    kwargs = made.network.model_kwargs if "network" in made else made
    assert isinstance(kwargs, DictConfig)
    root = authors_network(tensors, model_kwargs=kwargs, img_resolution=4, label_dim=3)
    own = {
        "do_scale_param": True,
        "detach_jvp": False,
        **{"img_resolution": 4, "img_channels": 4, "label_dim": 3, "dtype": torch.float32},
    }
    vars(root).update({name: value for name, value in (own | state).items() if value is not ...})
    vars(root)["_init_args"] = ()
    return root


class Outer:
    """A class within a class, which older protocols take out of it by `getattr`."""

    class Inner:
        def __init__(self) -> None:
            self.context, self.words = contextlib.nullcontext(), {"a", "b"}

        def method(self) -> None:
            """A bound one is pickled as getattr(object, name)."""


def training_state(network: nn.Module) -> dict[str, Any]:
    """What a `training-state-*.pt` holds: the network and an optimiser, with objects of all kinds about."""
    parameters = [nn.Parameter(torch.ones(2))]
    parameters[0].note = "kept beside the numbers"  # type: ignore[attr-defined]
    inner = Outer.Inner()
    return {
        "net": network,
        "optimizer_state": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]},
        "parameters": parameters,
        "types": [int, str, set, list, frozenset({1})],
        "inner": [inner, inner.method, functools.partial(torch.nn.functional.gelu, approximate="tanh")],
        "cur_nimg": 10**12,
    }


def authors_bytes(content: Any, protocol: int = 4) -> bytes:
    """The pickle that their code would write of `content`."""
    with _their_modules():
        return pickle.dumps(content, protocol)


def authors_torch_bytes(content: Any) -> bytes:
    """What `torch.save` would write of it, in protocol 2."""
    file = io.BytesIO()
    with _their_modules():
        torch.save(content, file)
    return file.getvalue()


@contextmanager
def _their_modules() -> Iterator[None]:
    """The names under which their classes are pickled, while they are pickled."""
    places = {
        "torch_utils.persistence": _reconstruct_persistent_obj,
        "dnnlib.util": EasyDict,
        "training.loop": Outer,
    }
    names = [name for place in places for name in (place.split(".")[0], place)]
    assert not any(name in sys.modules for name in names)
    before: dict[Any, str] = {thing: thing.__module__ for thing in (*places.values(), Outer.Inner)}
    try:
        sys.modules.update({name: ModuleType(name) for name in names})
        for place, thing in places.items():
            setattr(sys.modules[place], thing.__name__, thing)
            thing.__module__ = place
        Outer.Inner.__module__ = Outer.__module__
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
