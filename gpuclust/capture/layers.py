"""List what a network's forward pass computes, layer by layer, and choose from it."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gpuclust.capture.trace import Call, trace_forward, unwrap
from gpuclust.errors import InputError

LISTS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Layer:
    """One activation that a forward pass computes.

    Attributes
    ----------
    name
        Friendly and unique: ``conv1``, ``layer3.5``, ``fc8``; the module's name where nothing friendlier is known.
    module
        Qualified name of the module whose output it is, or starts from (see `after`).
    kind
        ``conv``, ``linear``, ``pool``, or ``block`` for the output of anything that holds several layers.
    shape
        Of one image.
    call
        Which call of that module in one forward pass, from 0.
    after
        The functions applied to the module's output before it is captured, joined by ``+``: ``relu`` where the
        forward pass calls ``F.relu(self.bn1(x))``; empty where the module's own output is captured.
    auto
        Whether it belongs to the default choice.
    aliases
        Other modules (and ``module:call``) whose output is the same values.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    call: int = 0
    after: str = ""
    auto: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def values(self) -> int:
        """Values per image."""
        return math.prod(self.shape)


def find_layers(module: nn.Module, example: Tensor) -> list[Layer]:
    """Every layer that can be captured, in the order in which one forward pass completes them.

    Runs the network once, in eval mode and without gradients, on `example` twice over (a batch of one would not
    tell a batch from a dimension that happens to be one). Modes and hooks are restored whatever happens.

    Of a module that returns a tuple, list or dict the first tensor counts. An output whose first dimension is not the
    batch is left out, and so is one that is the input. Outputs that are the same values (a Sequential and its last
    child) are one layer with `aliases`.

    Parameters
    ----------
    module
        The network; DataParallel and torch.compile wrappers are looked through.
    example
        One image, ``(1, c, h, w)``, on the network's device.

    Raises
    ------
    InputError
        If nothing in the network can be captured.
    """
    module = unwrap(module)
    calls = trace_forward(module, example)
    if not calls:
        raise InputError(
            f"{type(module).__name__} has no layer that can be captured: none of its modules returns a tensor "
            "whose first dimension is the batch (scripted modules cannot be looked into)"
        )
    return _name_layers(module, calls)


def choose_layers(layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """The layers that any pattern asks for, in the order of the forward pass.

    Parameters
    ----------
    layers
        What `find_layers` found.
    patterns
        Each ``auto``, ``all``, or a glob (case sensitive) over friendly and module names; several may be joined by
        commas. A pattern that is exactly a friendly name means that layer alone.

    Raises
    ------
    InputError
        For a pattern that matches nothing, with close names.
    """
    wanted: set[str] = set()
    names = {layer.name for layer in layers}
    singles = [part.strip() for pattern in patterns for part in pattern.split(",") if part.strip()]
    if not singles:
        raise InputError(
            "no layer was asked for: give auto, all, or a pattern over the names that `gpuclust layers` prints"
        )
    for pattern in singles:
        if pattern in names:
            matched = {pattern}
        elif pattern == "auto":
            matched = {layer.name for layer in layers if layer.auto}
        elif pattern == "all":
            matched = names
        else:
            matched = {layer.name for layer in layers if any(fnmatch.fnmatchcase(n, pattern) for n in _names(layer))}
        if not matched and pattern == "auto":
            raise InputError(
                "no convolution, linear layer or block was recognised in this network, so no layer is the default: "
                f"choose with --layers from the {len(layers)} that `gpuclust layers` prints"
            )
        if not matched:
            every = [name for layer in layers for name in _names(layer)]
            close = difflib.get_close_matches(pattern, every, n=4, cutoff=0.5) or [layer.name for layer in layers][:4]
            raise InputError(
                f"no layer is called {pattern!r}; close: {', '.join(dict.fromkeys(close))}; `gpuclust layers` prints "
                f"all {len(layers)}, and auto, all and globs (features.*) are allowed"
            )
        wanted |= matched
    return [layer for layer in layers if layer.name in wanted]


# ---- the default choice


def _name_layers(module: nn.Module, calls: list[Call]) -> list[Layer]:
    """One Layer for every group of calls that hold the same values, the default choice marked and named."""
    groups: dict[tuple[int, ...], list[Call]] = {}
    for call in calls:
        groups.setdefault(call.key, []).append(call)
    auto = _choose_auto(module, calls, groups)
    pools = _name_pools(calls, auto)
    names: dict[int, str] = {}
    for group in groups.values():
        # Modules before functions: a hook costs less than watching every function.
        call = next((c for c in group if id(c) in auto), None) or next((c for c in group if not c.after), group[0])
        names[id(call)] = auto.get(id(call)) or pools.get(id(call)) or call.label
    taken = set(auto.values())
    names = {key: name if key in auto or name not in taken else f"{name}:raw" for key, name in names.items()}
    names = _distinguish(names)
    layers = []
    for group in groups.values():
        call = next(c for c in group if id(c) in names)
        holds_several = call.holds > 1 and not call.after
        kind = "block" if holds_several else next((c.kind for c in group if c.kind != "block"), "block")
        aliases = tuple(c.label for c in group if c is not call and not c.after)
        after = "+".join(call.after)
        layers.append(
            Layer(names[id(call)], call.module, kind, call.shape, call.index, after, id(call) in auto, aliases)
        )
    return layers


def _choose_auto(module: nn.Module, calls: list[Call], groups: dict[tuple[int, ...], list[Call]]) -> dict[int, str]:
    """The default choice: the id of each call in it, with its friendly name.

    The outputs of repeated blocks where the network has them, every convolution and linear layer outside of blocks
    with the non-linearity that directly follows it, and pooled features.
    """
    weighted = list(dict.fromkeys(call.module for call in calls if call.source is call))
    for call in calls:
        call.holds = _count(weighted, call.module) if call.module else 0
    blocks = _find_blocks(module, weighted)
    chosen: dict[int, str] = {}
    plain: list[tuple[Call, str]] = []
    for call in calls:
        # A function's call carries the module that it follows: on a block's own output it is outside of the block.
        if call.module in blocks and not call.after:
            chosen[id(call)] = call.label
        elif any(_inside(call.module, block) for block in blocks - {call.module}):
            continue
        elif call.source is call:
            target = call.activated or call
            group = groups.get(target.key, [target])
            # The widest module around this layer alone (with its norm and non-linearity) names it.
            owners = [c for c in group if not c.after and c.holds == 1 and _inside(call.module, c.module)]
            owner = min(owners, key=lambda c: len(c.module)) if owners and not call.index else call
            if target.after:
                target = next((c for c in group if not c.after), target)
            chosen[id(target)] = owner.label
            plain.append((target, owner.label))
        elif call.kind == "pool" and math.prod(call.shape[1:]) == 1 and not _is_window(module, call):
            pools = [c for c in groups[call.key] if c.kind == "pool"]
            pool = min(pools, key=lambda c: (len(c.after), len(c.module)))
            chosen[id(pool)] = "pool" if pool.after or (pool.module.isdigit() and not blocks) else pool.label
    if not blocks:
        chosen |= _number(module, calls, plain)
    return _distinguish(chosen)


def _number(module: nn.Module, calls: list[Call], plain: list[tuple[Call, str]]) -> dict[int, str]:
    """conv1 ... fc8 where the modules' own names are positions in a Sequential; conv1_1 ... in a VGG."""
    vgg = any(c.__module__ == "torchvision.models.vgg" for c in type(module).__mro__)
    if not vgg and not any(name.rpartition(".")[2].isdigit() for _, name in plain):
        return {}
    numbers: dict[int, str] = {}
    targets = {id(target) for target, _ in plain}
    stage, place = 1, 0
    for call in calls:
        if vgg and call.kind == "pool" and place:
            stage, place = stage + 1, 0
        if id(call) not in targets:
            continue
        if call.kind == "linear":
            numbers[id(call)] = f"fc{stage}"
            stage += 1
        elif vgg:
            place += 1
            numbers[id(call)] = f"conv{stage}_{place}"
        else:
            numbers[id(call)] = f"conv{stage}"
            stage += 1
    # A number that is the name of another module would make every pattern ambiguous.
    return {} if set(numbers.values()) & {call.module for call in calls} else numbers


def _name_pools(calls: list[Call], auto: dict[int, str]) -> dict[int, str]:
    """pool1 ... pool5: the pools of a Sequential that directly follow a numbered convolution, by its number."""
    names, before, taken = {}, "", {call.module for call in calls}
    for call in calls:
        if id(call) in auto:
            before = auto[id(call)]
        elif call.kind == "pool" and not call.after and call.module.rpartition(".")[2].isdigit():
            numbered = re.fullmatch(r"conv(\d+)(_\d+)?", before)
            if numbered and (name := f"pool{numbered[1]}") not in taken:
                names[id(call)], before = name, ""
    return names


def _distinguish(names: dict[int, str]) -> dict[int, str]:
    """The same names, the second and later ones of each made unique by a number."""
    seen: Counter[str] = Counter()
    unique = {}
    for key, name in names.items():
        unique[key] = f"{name}:{seen[name]}" if seen[name] else name
        seen[name] += 1
    return unique


def _find_blocks(root: nn.Module, weighted: Sequence[str]) -> set[str]:
    """Names of the outermost repeated blocks; none where no two blocks hold several convolutions or linear layers."""
    occurrences = Counter(type(module) for module in root.modules())

    def containers(parent: nn.Module, name: str) -> dict[str, nn.Module]:
        children = {f"{name}.{key}" if name else key: child for key, child in parent.named_children()}
        return {
            full: child
            for full, child in children.items()
            if full not in weighted and any(child.children()) and _count(weighted, full)
        }

    def is_stage(child: nn.Module, name: str) -> bool:
        """A stack of blocks: a list of containers, or a module around a list of blocks of one class."""
        if isinstance(child, LISTS):
            return bool(containers(child, name))
        for full, part in containers(child, name).items():
            inner = containers(part, full) if isinstance(part, LISTS) else {}
            alike = len({type(block) for block in inner.values()}) == 1
            if alike and len(real(inner)) == len(inner) > 1 and not isinstance(next(iter(inner.values())), LISTS):
                return True
        return False

    def real(names: Collection[str]) -> list[str]:
        return [name for name in names if _count(weighted, name) > 1]

    def signature(child: nn.Module) -> tuple[type, ...]:
        return (type(child), *map(type, child.children()))

    def walk(parent: nn.Module, name: str, *, singles: bool) -> Iterator[str]:
        children = containers(parent, name)
        open_ = {full: child for full, child in children.items() if not is_stage(child, full)}
        alike = Counter(signature(child) for child in open_.values())
        found = {
            full
            for full, child in open_.items()
            if (alike[signature(child)] if type(child) in LISTS else occurrences[type(child)]) > 1
        }
        if singles and (isinstance(parent, LISTS) or len(real(found)) > 1):
            # A class of its own among blocks (Inception's reductions, EfficientNet's first) is one too, unless it
            # is a whole network of blocks.
            found |= {
                full
                for full, child in open_.items()
                if type(child) not in LISTS and len(real(list(walk(child, full, singles=False)))) < 2
            }
        for full, child in children.items():
            if full in found:
                yield full
            else:
                yield from walk(child, full, singles=singles)

    if len(real(list(walk(root, "", singles=False)))) < 2:
        return set()
    return set(walk(root, "", singles=True))


def _is_window(module: nn.Module, call: Call) -> bool:
    """Whether a pool takes the maximum of windows: only of a small image does it then leave one value per channel."""
    return not call.after and isinstance(module.get_submodule(call.module), nn.modules.pooling._MaxPoolNd)


def _inside(name: str, container: str) -> bool:
    return not container or name == container or name.startswith(container + ".")


def _count(names: Collection[str], container: str) -> int:
    """How many of the names are the container's or inside it."""
    return sum(_inside(name, container) for name in names)


def _names(layer: Layer) -> tuple[str, ...]:
    return (layer.name, layer.module, *layer.aliases)
