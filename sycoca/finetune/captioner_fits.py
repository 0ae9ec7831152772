"""How each lightweight captioner is fitted: by the `captioner.type` of its configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict

from sycoca.config import Config, load_config
from sycoca.finetune.cgtgan import CgTGanFit, fit_cgtgan
from sycoca.finetune.closed_form import ReCapFit, SittaFit, fit_recap, fit_sitta
from sycoca.finetune.smallcap import SmallCapFit, fit_smallcap
from sycoca.types import ConfigError


class Fit(NamedTuple):
    """One kind of captioner."""

    schema: type[Config]
    """Of the experiment."""
    fit: Callable[[Any], dict[str, Any]]
    """Fits as the experiment says and saves the captioner; gives `captioner`, its folder, and figures. All ranks call it."""


FITS: dict[str, Fit] = {
    "recap": Fit(ReCapFit, fit_recap),
    "smallcap": Fit(SmallCapFit, fit_smallcap),
    "cgtgan": Fit(CgTGanFit, fit_cgtgan),
    "sitta": Fit(SittaFit, fit_sitta),
}


class _Typed(Config):
    model_config = ConfigDict(extra="ignore")
    type: str


class _Experiment(Config):
    model_config = ConfigDict(extra="ignore")
    captioner: _Typed


def fit_captioner(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Fit the captioner that a configuration describes. Raises ConfigError, and what its fit raises."""
    kind = load_config(_Experiment, path, overrides).captioner.type
    if kind not in FITS:
        raise ConfigError(f"{path}: captioner.type: expected one of {', '.join(sorted(FITS))}, found {kind!r}")
    return FITS[kind].fit(load_config(FITS[kind].schema, path, overrides))
