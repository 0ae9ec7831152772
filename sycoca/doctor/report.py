"""What a check-up finds: one sentence a check, and whether it is ok, a warning or wrong."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; where it is not ok, `says` ends with what to do."""

    name: str
    status: Status
    says: str


def judge(name: str, status: Status, says: str, mend: str) -> Check:
    """A finding with the way to mend it, which is left out where all is well."""
    return Check(name, status, says if status == "ok" else f"{says}; {mend}")


def grade(value: float, *, warn_above: float, wrong_above: float = float("inf")) -> Status:
    """How bad a number is that should be small."""
    return "wrong" if value > wrong_above else "warning" if value > warn_above else "ok"


def table(checks: Sequence[Check]) -> str:
    """A line a check, for people."""
    name_width = max(len(check.name) for check in checks)
    return "\n".join(f"{check.name:{name_width}s}  {check.status:7s}  {check.says}" for check in checks)


def summary(checks: Sequence[Check]) -> dict[str, Any]:
    """The same for programs."""
    counts = {f"num_{status}": sum(check.status == status for check in checks) for status in ("ok", "warning", "wrong")}
    return {**counts, "checks": [asdict(check) for check in checks]}
