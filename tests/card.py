"""A graphics card where there is none: the torch device "card" computes on the CPU, nearly as strict as hardware.

    install(monkeypatch)
    x = torch.ones(3).to("card")        # x + torch.ones(3): RuntimeError; x.cpu() + torch.ones(3): twos

Its numbers are those of torch on the CPU, so what a command makes on it can be compared with what it makes without. It
refuses much of what cards do: tensors of two devices in one operation, and NumPy. It also refuses what only Apple's do,
float64, decompositions of matrices and what else they lack, and what none would, but this project must not do: random
numbers of its own.

Built on torch's way to write a device in Python, which is not finished: hence what `install` replaces.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
# Indices may lie on the CPU: hardware fetches them. Not what is indexed, nor what is put there.
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
LACKING = (aten.take.default,)  # of what this project is tempted to use, by the list of operations in torch's source
NORMS = ("aten::linalg_vector_norm", "aten::linalg_matrix_norm")


class OnCard(torch.Tensor):
    """A tensor that says it is on the card; its numbers are in `inner`, on the CPU. TypeError for float64."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCard":
        if inner.dtype == torch.float64:
            raise TypeError("the card has no float64")
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **like, device=torch.device("card:0"))

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"OnCard({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


def check(func: Any, args: tuple, tensors: list[Tensor], result_there: bool) -> None:
    """RuntimeError for operations that the card refuses, or that no device but the CPU should be asked for."""
    if any(isinstance(x, OnCard) for x in tensors) and func is not aten.copy_.default:
        indices = tree_leaves(args[1]) if func in INDEXING else []
        # A single number of the CPU's may come along where numbers are computed one by one, but not be changed.
        changed = args[0] if func._schema.is_mutable else None
        alone = torch.Tag.pointwise in func.tags or func in INDEXING
        strangers = [x for x in tensors if not isinstance(x, OnCard) and not any(x is i for i in indices)]
        if any(x.dim() or not alone or x is changed for x in strangers):
            raise RuntimeError(f"{func}: some tensors are on the card, and some are not")
    if result_there and func in LACKING:
        raise RuntimeError(f"{func}: Apple's cards have no such operation")
    if result_there and torch.Tag.nondeterministic_seeded in func.tags:
        raise RuntimeError(f"{func}: random numbers of the card's own")
    if result_there and "linalg" in func.name() and func.name().split(".")[0] not in NORMS:
        raise RuntimeError(f"{func}: the card decomposes no matrices")


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation of torch, on what the tensors hold; RuntimeError as in `check`."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    asked = kwargs.get("device")
    there = any(isinstance(x, OnCard) for x in tensors) if asked is None else torch.device(asked).type == "card"
    check(func, args, tensors, there)
    inner, options = tree_map_only(OnCard, lambda x: x.inner, (args, kwargs))
    made = func(*inner, **(options if asked is None else options | {"device": "cpu"}))
    if func is aten.copy_.default:
        return args[0]
    if not there:
        return made
    made = tree_map_only(Tensor, OnCard, made)
    return made if asked is not None else return_and_correct_aliasing(func, args, kwargs, made)


# When this module is imported, for all of the process: torch counts its devices at the first gradient.
_setup_privateuseone_for_python_backend("card")
torch.card.get_amp_supported_dtype = list  # what checkpoints in backward ask for
LIBRARY = torch.library.Library("_", "IMPL")
LIBRARY.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")


def moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor or torch.as_tensor, which make tensors of Python's numbers on the CPU alone."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs) if device is None else make(*args, **kwargs).to(device)

    return made


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's devices in Python lack: the way from Python's numbers and to them."""
    tolist, new_tensor, getitem = torch.Tensor.tolist, torch.Tensor.new_tensor, torch.Tensor.__getitem__

    def listed(self: Tensor) -> list:
        return self.inner.tolist() if isinstance(self, OnCard) else tolist(self)

    def alike(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, OnCard):
            return new_tensor(self, data, **kwargs)
        return torch.tensor(data, dtype=kwargs.get("dtype", self.dtype)).to(self.device)

    def item(self: Tensor, index: Any) -> Tensor:
        if isinstance(self, OnCard) and isinstance(index, list):
            index = torch.tensor(index, dtype=None if index else torch.long)
        return getitem(self, index)

    for name, function in (("tolist", listed), ("new_tensor", alike), ("__getitem__", item)):
        monkeypatch.setattr(torch.Tensor, name, function)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, moved(getattr(torch, name)))
