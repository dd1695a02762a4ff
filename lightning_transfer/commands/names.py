"""Refuse misspelt names in configuration files, before jsonargparse prints all that could be written."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from lightning_transfer.errors import check_name
from lightning_transfer.methods.collaborative.search.options import LayerSearch
from lightning_transfer.methods.selective.options import Neighbors
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.task import SourceTask

OBJECTS: dict[str, Iterable[str]] = {  # options that a file may write as the arguments of an object
    "weight": signature(Schedule).parameters,
    "neighbors": signature(Neighbors).parameters,
    "search": signature(LayerSearch).parameters,
    "source": [*signature(SourceTask).parameters, "from_timm"],
}


def check_names(given: Any) -> None:
    """Refuse a misspelt class of this package, or a misspelt option of one, anywhere in what a file holds.

    Raises:
        TransferConfigError: the message names the one that is most similar, and all that there are.
    """
    for value in given.values() if isinstance(given, Mapping) else given if isinstance(given, list) else ():
        check_names(value)
    path = given.get("class_path") if isinstance(given, Mapping) else None
    home, _, name = str(path).rpartition(".")
    if home not in ("lightning_transfer", "lightning_transfer.callbacks"):
        return
    module = import_module(home)
    classes = {each: found for each in module.__all__ if isinstance(found := getattr(module, each), type)}
    check_name(home, "class", name, classes)
    for key in given:
        check_name(name, "key", key, ("class_path", "init_args", "dict_kwargs"))
    if isinstance(options := given.get("init_args"), Mapping):
        check_options(classes[name], options, name)


def check_options(make: Callable[..., Any], given: Mapping[str, Any], title: str) -> None:
    """Refuse a name that is not an argument of a class or function, or of an object among its options."""
    for key, value in given.items():
        check_name(title, "option", key, signature(make).parameters)
        if key in OBJECTS and isinstance(value, Mapping) and "class_path" not in value:
            for inner in value:
                check_name(f"{key} of {title}", "option", inner, OBJECTS[key])
