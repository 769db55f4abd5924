"""Where networks come from: torchvision, timm, a checkpoint, the user's own module."""

from __future__ import annotations

import difflib
import http.client
import importlib
import io
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from gpuclust.arithmetic import seeded
from gpuclust.capture.trace import unwrap
from gpuclust.errors import InputError, UnavailableError, users_code

Transform = Callable[[Any], Any]

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
# Heads that only training uses, in torchvision's GoogLeNet and Inception: a checkpoint may have them or not.
AUXILIARY = re.compile(r"^(aux1|aux2|AuxLogits)\.")
NOTHING = re.compile(r"(?!)")
# torchvision's published DenseNets keep their old names ("norm.1"), which its own loader renames too.
OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")
ALLOWED = (
    "a torchvision classifier, timm:NAME, or package.module:callable returning nn.Module or (nn.Module, transform)"
)


@dataclass(frozen=True)
class Network:
    """A network that is ready for a forward pass, with what belongs to it.

    Attributes
    ----------
    name
        As it was asked for; the class's name for a module.
    module
        In eval mode if it was built here.
    transform
        PIL image -> tensor ``(c, h, w)``, as the weights were trained; None where nothing is known.
    input_shape
        ``(c, h, w)``; None where the first batch decides.
    weights
        What the parameters are, in words.
    categories
        Names of the classifier's outputs where the weights tell them.
    notes
        What else a reader of the results should know.
    """

    name: str
    module: nn.Module
    transform: Transform | None = None
    input_shape: tuple[int, ...] | None = None
    weights: str = ""
    categories: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)


def load_network(
    model: str | nn.Module | tuple[nn.Module, Transform | None],
    weights: str = "DEFAULT",
    *,
    seed: int = 0,
    download: bool = True,
) -> Network:
    """The network that `model` names, with `weights`.

    Parameters
    ----------
    model
        A torchvision classifier's name, ``timm:NAME``, ``package.module:callable`` (the current folder is
        importable), a module, or (module, transform).
    weights
        ``DEFAULT`` (the best published), the name of published weights (``IMAGENET1K_V1``; for timm the tag),
        ``none`` (random, from `seed`), or the path of a checkpoint, which is read by
        ``torch.load(weights_only=True)`` or safetensors and nothing else. A module or callable brings its own:
        ``DEFAULT`` takes them as they come, a checkpoint replaces them, and nothing else is allowed.
    seed
        Of the random initialisation.
    download
        False: published weights are not fetched but random ones put in their place, for what depends on the network and
        its transform alone.

    Raises
    ------
    InputError
        For an unknown model or weights, with close names, and for a checkpoint that does not fit.
    UnavailableError
        Where weights have to be downloaded and cannot be, or timm is not installed.
    """
    if isinstance(model, nn.Module):
        return _given(type(unwrap(model)).__name__, model, None, weights)
    if isinstance(model, tuple):
        module, transform = _module_and_transform(model, "model")
        return _given(type(unwrap(module)).__name__, module, transform, weights)
    if not isinstance(model, str):
        raise InputError(f"model is {ALLOWED}, or such a module itself; got {type(model).__name__}")
    if model.startswith("timm:"):
        return _from_timm(model, weights, seed, download)
    if ":" in model:
        with seeded(seed):
            made = call_object(model)
        module, transform = _module_and_transform(made, model)
        return _given(model, module.eval(), transform, weights)
    return _from_torchvision(model, weights, seed, download)


def with_usual_transform(network: Network) -> Network:
    """The network with the transform that most networks of the field were trained for, and a note that says so."""
    from torchvision.transforms._presets import ImageClassification

    transform = ImageClassification(crop_size=224)
    note = (
        "none came with the network, so pictures are resized to 256 pixels, cropped to 224 and normalised as is usual "
        "for ImageNet; package.module:callable may return (module, transform)"
    )
    shape = _crop_shape(transform)
    return replace(network, transform=transform, input_shape=shape, notes={**network.notes, "transform": note})


def import_object(path: str) -> Callable[..., Any]:
    """What ``package.module:name`` means, with the current folder importable.

    Raises
    ------
    InputError
        If there is no such module, or no such callable in it.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", path):
        raise InputError(f"{path!r} is not package.module:callable, as in mynets.small:build")
    module_name, _, name = path.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with users_code(f"importing {module_name} raised"):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there; something that it imports is not
            raise InputError(
                f"no module {module_name!r} for {path!r}: it is looked for in {folder} and on sys.path"
            ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=4)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise InputError(f"{module_name} has no {name!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{path!r} is not callable: {type(found).__name__}")
    return found


def call_object(path: str) -> Any:
    """What the callable ``package.module:name`` returns.

    Raises
    ------
    InputError
        If there is no such callable, or if it raises.
    """
    make = import_object(path)
    with users_code(f"{path} raised"):
        return make()


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, out of the wrappings that training scripts put around it.

    Raises
    ------
    InputError
        If there is no such file, or if it holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no checkpoint at {path}: --weights is DEFAULT, the name of published weights, none, or a file"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {_reason(error)}") from error
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on old formats that may not load: what doesn't is an error anyway
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what unpickling a broken or hostile file raises has no bounds
            raise InputError(
                f"{path} cannot be read as weights alone ({_reason(error)}): "
                "save model.state_dict() with torch.save or safetensors"
            ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no state dict (names to tensors), but {type(state).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put a state dict into a module: all of it, or an error before anything is changed.

    Prefixes that wrappers leave (``module.``, ``_orig_mod.``, ``model.``) are cut, and the auxiliary heads of
    GoogLeNet and Inception may be missing on either side.

    Raises
    ------
    InputError
        For missing, unexpected or wrongly shaped parameters: names the first few.
    """
    from torchvision.models import GoogLeNet, Inception3

    own = module.state_dict()
    given = dict(state)
    optional = AUXILIARY if isinstance(module, GoogLeNet | Inception3) else NOTHING
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in given) and not all(name.startswith(prefix) for name in own):
            given = {name.removeprefix(prefix): value for name, value in given.items()}
    given = {OLD_DENSENET.sub(r"\1\2", name) if name not in own else name: value for name, value in given.items()}
    missing = [
        name
        for name in own
        # Checkpoints of before batch norm counted its batches are whole; the count takes no part in eval mode.
        if name not in given and not optional.match(name) and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in given if name not in own and not optional.match(name)]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise InputError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}. Give the network that it "
            "was saved from; one with another number of classes comes from package.module:callable"
        )
    module.load_state_dict({name: value for name, value in given.items() if name in own}, strict=False)


# ---- the sources


def _given(name: str, module: nn.Module, transform: Transform | None, weights: str) -> Network:
    """A module of the user's: its weights are as they come, or a checkpoint's."""
    described = "as given"
    if weights != "DEFAULT":
        if weights == "none" or not _is_path(weights):
            raise InputError(
                f"{name} brings its own weights: --weights is DEFAULT, which takes them as they come, or a "
                f"checkpoint's path; got {weights!r}"
            )
        load_weights(unwrap(module), load_state(weights), weights)
        described = f"file {weights}"
    return Network(name, module, transform, _crop_shape(transform), described)


def _from_torchvision(name: str, weights: str, seed: int, download: bool) -> Network:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(f"unknown model {name!r}{_close(name, known)}; allowed: {ALLOWED}")
    published = torchvision.models.get_model_weights(name)
    names = list(dict.fromkeys(["DEFAULT", *published.__members__]))
    chosen = published["DEFAULT"] if "DEFAULT" in published.__members__ else next(iter(published), None)
    # The auxiliary heads of GoogLeNet and Inception take no part in eval mode; their own initialisation takes a while,
    # and is only wanted where it stays.
    bare = {"aux_logits": False, "init_weights": weights == "none"} if name in ("googlenet", "inception_v3") else {}
    notes = {}
    pretrained = weights in names and chosen is not None
    if pretrained:
        chosen = published[weights]
    if pretrained and chosen is not None and download:
        try:
            # Before anything is built, so that a machine without a network is told at once, and read as weights
            # alone; get_model, which would unpickle anything, then finds this same file cached.
            with _bar_on_a_terminal() as progress:
                chosen.get_state_dict(progress=progress, check_hash=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, http.client.HTTPException) as error:
            raise _unavailable(f"the weights {chosen} of {name} from {chosen.url}", error) from error
        module = torchvision.models.get_model(name, weights=chosen)
        described, categories = f"{chosen} (torchvision)", tuple(chosen.meta.get("categories", ()))
    elif pretrained or weights == "none" or _is_path(weights):
        with seeded(seed):
            module = torchvision.models.get_model(name, weights=None, **bare)
        described, categories = f"none (random, seed {seed})", ()
        if weights != "none" and not pretrained:
            state = load_state(weights)
            load_weights(module, state, weights)
            described = f"file {weights}"
            if bare:
                module.transform_input = True
    else:
        raise InputError(
            f"unknown weights {weights!r} for {name}{_close(weights, names)}; allowed: {', '.join(names)}, none, or "
            "the path of a checkpoint that exists"
        )
    if bare:
        notes["transform_input"] = (
            "on: the network rescales ImageNet-normalised images to [-1, 1], as torchvision's weights expect"
            if module.transform_input
            else "off: torchvision rescales images inside the network only with pretrained weights"
        )
    transform = chosen.transforms() if chosen is not None else None
    return Network(name, module.eval(), transform, _crop_shape(transform), described, categories, notes)


def _from_timm(model: str, weights: str, seed: int, download: bool) -> Network:
    try:
        import timm
        import timm.data
    except ImportError:
        raise UnavailableError(f"{model} needs timm, which is not installed: pip install 'gpuclust[timm]'") from None
    name = model.removeprefix("timm:")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"unknown timm model {name!r}{_close(architecture, timm.list_models())}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    pretrained = weights == "DEFAULT" or weights in tags
    if weights in tags:
        name = f"{architecture}.{weights}"
    if not pretrained and weights != "none" and not _is_path(weights):
        raise InputError(
            f"unknown weights {weights!r} for {model}{_close(weights, tags)}; allowed: DEFAULT, {', '.join(tags)}, "
            "none, or the path of a checkpoint that exists"
        )
    if "." in name and name.partition(".")[2] not in tags:
        raise InputError(
            f"unknown weights in {model!r}{_close(name.partition('.')[2], tags)}; allowed: {', '.join(tags)}"
        )
    if pretrained and not download:
        pretrained, weights = False, "none"
    if pretrained and not tags:
        raise InputError(f"{model} has no published weights: --weights PATH with a local file, or --weights none")
    try:
        with seeded(seed), _hub_cache_if_unreachable() if pretrained else nullcontext():
            module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # the hub's client raises what its HTTP library does
        if not pretrained:
            raise
        raise _unavailable(f"the weights of {model} from the Hugging Face hub", error) from error
    described = f"none (random, seed {seed})"
    if pretrained:
        published = timm.models.get_pretrained_cfg(name)
        described = f"{published.tag if published else 'DEFAULT'} (timm)"
    elif weights != "none":
        load_weights(module, load_state(weights), weights)
        described = f"file {weights}"
    config = timm.data.resolve_data_config(model=module)
    transform = timm.data.create_transform(**config, is_training=False)
    return Network(model, module.eval(), transform, tuple(config["input_size"]), described)


@contextmanager
def _bar_on_a_terminal() -> Iterator[bool]:
    """Whether torch should show a download's progress; what it prints goes to a terminal's stderr or nowhere."""
    if sys.stderr.isatty():
        with redirect_stdout(sys.stderr):
            yield True
    else:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield False


@contextmanager
def _hub_cache_if_unreachable() -> Iterator[None]:
    """Without a network, let the Hugging Face hub's client look into its cache alone: it retries for 45 s otherwise."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except HTTPError:
        pass  # an answer
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _module_and_transform(made: Any, source: str) -> tuple[nn.Module, Transform | None]:
    module, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not (transform is None or callable(transform)):
        raise InputError(f"{source} is an nn.Module or (nn.Module, transform); got {type(made).__name__}")
    return module, transform


def _crop_shape(transform: Transform | None) -> tuple[int, ...] | None:
    """The input shape of torchvision's own presets, which state their crop."""
    crop = getattr(transform, "crop_size", None)
    return (3, *crop[-1:], *crop[-1:]) if crop else None


def _is_path(weights: str) -> bool:
    return weights.endswith(CHECKPOINT_SUFFIXES) or os.sep in weights or os.path.isfile(weights)


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"; close: {', '.join(close)}" if close else ""


def _unavailable(what: str, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"cannot get {what} ({_reason(error)}): give a local file with --weights PATH, or random weights with "
        "--weights none"
    )


def _reason(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return str(error.reason)
    text = str(error)
    if "weights_only" in text:  # torch's advice begins with how to switch it off; what was wrong comes further down
        found = re.search(r"(Trying to load u|U)nsupported ((?!\. )[^\n])*", text)
        text = found[0] if found else "more than tensors"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
