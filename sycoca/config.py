"""Load, merge, override and dump configurations.

YAML files are read and merged by OmegaConf (`base:` names a file to inherit from, `${oc.env:NAME}` reads the
environment, `a.b=value` overrides), then checked by a pydantic model. What comes out is immutable.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

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
        tree = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
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


def _explain(schema: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_names(schema, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        return f"{where}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{where}: missing, it has no default"
    return f"{where}: {problem['msg']}, found {problem['input']!r}"


def _known_names(schema: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that sits at `path` inside `schema`; union tags and list indices are stepped over."""
    models = {schema}
    for part in path:
        inner = {m for model in models for m in _models_in(model.model_fields.get(str(part)))}
        models = inner or {m for m in models if _tag(m) in (None, part)} or models
    return sorted({name for model in models for name in model.model_fields})


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return field.default if field is not None else None


def _models_in(field: FieldInfo | None) -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = set()
    queue: list[Any] = [field.annotation] if field is not None else []
    while queue:
        kind = queue.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.add(kind)
        queue.extend(get_args(kind))
    return found
