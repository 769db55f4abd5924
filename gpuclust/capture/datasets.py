"""Classes and items of torch data sets: the user's own, a DataLoader's, torchvision's."""

from __future__ import annotations

import difflib
import inspect
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from gpuclust.capture.catalog import Catalog, natural
from gpuclust.capture.keys import Wanted
from gpuclust.errors import InputError, UnavailableError


def read_dataset(data: Dataset[Any] | DataLoader[Any], name: str | None = None) -> Catalog:
    """List the items of a map-style data set of (image, label) by their label.

    Labels are read from ``.targets``, ``.samples`` or ``.labels`` where the data set keeps them and its items say the
    same (one is read of each class, of at most 16 classes), else by one pass over the items. Classes are named by
    ``.classes`` where the labels are indices into it, else by the labels.

    Parameters
    ----------
    data
        A data set, or a DataLoader in a fixed order: its data set is read in gpuclust's own batches.
    name
        What to call it; its type by default.

    Raises
    ------
    InputError
        If the order isn't fixed, or if the items aren't (image, label) with one number or text as the label.
    """
    name = name or _name(data)
    dataset, indices = _fixed_order(data)
    labels, failed = _labels(dataset, indices)
    names = _class_names(dataset, set(labels.values()))
    items: dict[str, array[int]] = {name: array("q") for name in names.values()}
    for index, label in labels.items():
        items[names[label]].append(index)
    if not items:
        raise InputError(f"{name} holds no item that can be read" + (f": {failed[0][1]}" if failed else ""))

    def walk(wanted: Wanted) -> Iterator[tuple[str, Iterable[str]]]:
        for name, want in wanted.items():
            yield name, (key for key in map(str, items[name]) if want(key))

    counts = {name: len(some) for name, some in items.items()}
    parts: dict[str, tuple[str, ...]] = {name: (name,) for name in counts}
    return Catalog(name, "dataset", counts, walk, parts, unlabelled=tuple(failed), dataset=dataset)


def _fixed_order(data: Dataset[Any] | DataLoader[Any]) -> tuple[Dataset[Any], Iterable[int]]:
    """The map-style data set behind `data`, and the indices that take part."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InputError(
            f"a data set needs __len__ and __getitem__, so that every pass has one order; got {_name(dataset)}"
        )
    everything = range(len(dataset))
    if not isinstance(data, DataLoader):
        return dataset, everything
    if data.collate_fn is not default_collate and data.batch_size is not None:
        raise InputError(
            "the DataLoader's own collate_fn would not be used, since gpuclust makes its own batches of "
            f"{_name(dataset)}: pass loader.dataset if its items alone are what the network sees"
        )
    batches = data.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else data.sampler if batches is None else batches
    if isinstance(sampler, SequentialSampler):
        return dataset, everything
    shuffles = isinstance(sampler, (RandomSampler, WeightedRandomSampler, SubsetRandomSampler))
    if not shuffles:
        order = _flat(sampler)
        shuffles = getattr(sampler, "shuffle", False) is True or order != _flat(sampler)
    if shuffles:
        raise InputError(
            f"the DataLoader shuffles ({type(sampler).__name__}), and a pass needs a fixed order: pass it without "
            "shuffling, or pass loader.dataset; per_class and seed choose images at random"
        )
    return dataset, dict.fromkeys(order)


def _flat(sampler: Iterable[Any]) -> list[int]:
    return [int(i) for some in sampler for i in (some if isinstance(some, (list, tuple)) else (some,))]


def _labels(dataset: Dataset[Any], indices: Iterable[int]) -> tuple[dict[int, Any], list[tuple[str, str]]]:
    """The label of each index, and the items that failed to be read for it."""
    stored = _stored_labels(dataset)
    if stored is not None:
        labels = {i: _plain(stored[i], i) for i in indices}
        # A subclass may return other labels than the ones that it inherits.
        first = {label: i for i, label in reversed(labels.items())}
        samples = list(first.values())[:: -(-len(first) // 16)]
        if all(labels[i] == label for i, label in _read_labels(dataset, samples)[0].items()):
            return labels, []
    return _read_labels(dataset, indices)


def _read_labels(dataset: Dataset[Any], indices: Iterable[int]) -> tuple[dict[int, Any], list[tuple[str, str]]]:
    labels, failed = {}, []
    for i in indices:
        try:
            item = dataset[i]
        except Exception as error:  # whatever a user's data set raises on one item is one bad image
            failed.append((str(i), f"{type(error).__name__}: {error}"))
            continue
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise InputError(
                f"an item of a data set is (image, label); item {i} of {_name(dataset)} is {type(item).__name__}"
            )
        labels[i] = _plain(item[1], i)
    return labels, failed


def _stored_labels(dataset: Dataset[Any]) -> Sequence[Any] | None:
    """The labels that a data set keeps beside its images, if they are what its items return."""
    if isinstance(dataset, Subset):
        whole = _stored_labels(dataset.dataset)
        return None if whole is None else [whole[i] for i in dataset.indices]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    count = len(dataset)  # type: ignore[arg-type]
    for name in ("targets", "samples", "labels"):
        values = getattr(dataset, name, None)
        if values is not None and hasattr(values, "__getitem__") and len(values) == count:
            if name != "samples":
                return values.tolist() if hasattr(values, "tolist") else values
            if all(isinstance(value, (tuple, list)) and len(value) == 2 for value in values):
                return [value[1] for value in values]
    return None


def _plain(label: Any, index: int) -> int | float | str:
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    if isinstance(label, (np.ndarray, np.generic)) and label.size == 1:
        label = label.item()
    if isinstance(label, (int, float, str)):
        return label
    raise InputError(
        f"a label is one number or text; that of item {index} is {type(label).__name__} {str(label)[:60]!r}"
    )


def _class_names(dataset: Dataset[Any], labels: set[Any]) -> dict[Any, str]:
    """A name for each label, in the order of the classes: the data set's own names, else the labels themselves."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    named = getattr(dataset, "classes", None)
    numbers = all(isinstance(label, int) for label in labels)
    if numbers and isinstance(named, (list, tuple)) and all(0 <= label < len(named) for label in labels):
        # ImageNet's names are tuples of synonyms, and two of its classes are both called crane.
        texts = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in named]
        return {i: texts[i] if texts.count(texts[i]) == 1 else f"{texts[i]} ({i})" for i in sorted(labels)}
    numeric = all(isinstance(label, (int, float)) for label in labels)
    return {label: str(label) for label in sorted(labels, key=None if numeric else lambda label: natural(str(label)))}


def open_torchvision(text: str) -> Dataset[Any]:
    """The data set that ``torchvision:NAME:ROOT?option=value&...`` means; nothing is downloaded.

    Raises
    ------
    InputError
        For an unknown data set or option.
    UnavailableError
        If torchvision can't open it: most often since its files aren't there.
    """
    from torchvision import datasets

    name, _, root = text.removeprefix("torchvision:").partition(":")
    path, _, query = root.partition("?")
    if name not in datasets.__all__ or not inspect.isclass(getattr(datasets, name)):
        close = difflib.get_close_matches(name, datasets.__all__, n=4, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise InputError(f"torchvision has no data set {name!r}{hint}: write torchvision:NAME:ROOT, as in {text!r}")
    kind = getattr(datasets, name)
    defaults = {
        parameter.name: parameter.default
        for base in reversed(kind.__mro__[:-1])
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    allowed = sorted(set(defaults) - {"self", "root", "download", "loader"} - {n for n in defaults if "transform" in n})
    options: dict[str, Any] = {}
    for option, value in parse_qsl(query, keep_blank_values=True):
        if option not in allowed:
            raise InputError(f"{name} has no option {option!r} in {text!r}: it has {', '.join(allowed) or 'none'}")
        options[option] = _convert(value, defaults[option], f"{option} in {text!r}")
    if "root" in inspect.signature(kind).parameters:
        options["root"] = path
    if "download" in defaults:
        options["download"] = False
    try:
        return kind(**options)
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise UnavailableError(
            f"cannot open {text!r}: {error} (gpuclust downloads no data: put the files of {name} under "
            f"{path or 'ROOT'} first)"
        ) from error


def _convert(value: str, default: Any, where: str) -> Any:
    """A value of a query as the type of the argument's default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(default, int):
            return int(value)
        if isinstance(default, tuple):
            return tuple(int(number) for number in value.split(","))
    except (KeyError, ValueError):
        kind = "true or false" if isinstance(default, bool) else "whole numbers"
        raise InputError(f"{where} is {kind}; got {value!r}") from None
    return value


def _name(data: Any) -> str:
    if isinstance(data, DataLoader):
        return f"DataLoader({_name(data.dataset)})"
    return type(data).__qualname__
