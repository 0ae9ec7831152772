"""Load, merge, override and dump configurations.

YAML files are read and merged by OmegaConf (`base:` names a file to inherit from, `${oc.env:NAME}` reads the
environment, `a.b=value` overrides), then checked by a pydantic model. What comes out is immutable.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from sycoca.types import ConfigError

Schema = TypeVar("Schema", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def load_config(schema: type[Schema], path: str | Path, overrides: list[str] | None = None) -> Schema:
    """Read `path` with its bases, apply dotted overrides (`optim.lr=1e-4`) and check the result against `schema`.

    Raises ConfigError, with the dotted path, for a missing file, an unknown key, a wrong type, a missing value.
    """
    try:
        merged = OmegaConf.merge(_read(Path(path), ()), OmegaConf.from_dotlist(_checked(overrides or [])))
        tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{path}: {where}{_first_line(error.msg or error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_config(schema, tree, source=str(path))


def parse_config(schema: type[Schema], tree: Any, *, source: str) -> Schema:
    """Check a plain tree of dicts and lists against `schema`; `source` is named in errors."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(schema, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def _read(path: Path, parents: tuple[Path, ...]) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}{_named_by(parents)}")
    if path.resolve() in parents:
        raise ConfigError(f"{path}: `base` leads back to a file already being read")
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top of the file")
    bases = config.pop("base", [])
    if not isinstance(bases, str | list | ListConfig):
        raise ConfigError(f"{path}: base: expected the path of a file or a list of them, found {bases!r}")
    for base in reversed([bases] if isinstance(bases, str) else list(bases)):
        parent = _read(path.parent / base, (*parents, path.resolve()))
        config = OmegaConf.merge(_without_replaced(parent, config), config)
        assert isinstance(config, DictConfig)
    return config


def _without_replaced(parent: DictConfig, child: DictConfig) -> DictConfig:
    """An `objectives:` block replaces the parent's whole: an ablation says which objectives it has, not which it loses."""
    if "objectives" in child and "objectives" in parent:
        parent = parent.copy()
        parent.pop("objectives")
    return parent


def _named_by(parents: tuple[Path, ...]) -> str:
    return f" (named as `base` in {parents[-1]})" if parents else ""


def _checked(overrides: list[str]) -> list[str]:
    for override in overrides:
        if "=" not in override.lstrip("-") or override.startswith("-"):
            raise ConfigError(f"override {override!r}: expected key.sub=value, for example optim.lr=1e-4")
    return overrides


def _first_line(message: object) -> str:
    return str(message).partition("\n")[0]


def _explain(schema: type[BaseModel], problem: Any) -> str:
    *above, last = problem["loc"] or ("",)
    names, kinds = _walk(schema, above)
    if problem["type"] == "extra_forbidden":
        known = sorted({name for kind in kinds if _is_model(kind) for name in kind.model_fields})
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        return f"{'.'.join([*names, str(last)])}: unknown key{hint}"
    where = ".".join(_walk(schema, problem["loc"])[0])
    if problem["type"] == "missing":
        return f"{where}: missing, it has no default"
    return f"{where}: {_first_line(problem['msg'])}, found {problem['input']!r}"


def _walk(schema: type[BaseModel], path: Sequence[int | str]) -> tuple[list[str], list[Any]]:
    """The user's names along a pydantic location, and the types that may stand at its end.

    Where one of several models is chosen by its `type`, pydantic puts that tag into the location; a user does not write it.
    """
    names: list[str] = []
    kinds: list[Any] = [schema]
    for part in path:
        chosen = [kind for kind in kinds if _is_model(kind) and _tag(kind) == part]
        if chosen and len(kinds) > 1:
            kinds = chosen
        else:
            names.append(str(part))
            kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    return names, kinds


def _inside(kind: Any, part: int | str) -> list[Any]:
    """The types of a model's field, or of the items of a dict, list or tuple."""
    if _is_model(kind):
        field = kind.model_fields.get(str(part))
        return _alternatives(field.annotation) if field is not None else []
    return [inner for item in get_args(kind)[-1:] for inner in _alternatives(item)]


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, of an `Annotated` one too; any other type is its own only member."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return field.default if field is not None else None
