"""Configurations: reading, inheriting, overriding, refusing, and every YAML that is shipped."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from sycoca.config import Config, dump_config, load_config, parse_config
from sycoca.train.pretrain import PretrainConfig
from sycoca.types import ConfigError

ROOT = Path(__file__).parents[1]
PRETRAIN = ROOT / "configs" / "pretrain"
LR = "optim: {lr: 1.0}\n"
ABLATIONS = sorted((PRETRAIN / "ablation").glob("*.yaml"))


class Red(Config):
    type: Literal["red"] = "red"
    share: float = 0.5


class Blue(Config):
    type: Literal["blue"] = "blue"
    depth: int = 2


class Optim(Config):
    lr: float
    betas: tuple[float, float] = (0.9, 0.98)


class Experiment(Config):
    """As real ones are: nested, with a union, a list and a value that has no default."""

    optim: Optim
    shards: list[str] = []
    objectives: dict[str, Annotated[Red | Blue, Field(discriminator="type")]] = {}
    first: Red | None = None
    folder: str = "runs"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "main.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def read(path: Path, *overrides: str) -> Experiment:
    return load_config(Experiment, path, list(overrides))


def message(path: Path, *overrides: str) -> str:
    """The error of a configuration that is refused: one line."""
    with pytest.raises(ConfigError) as caught:
        read(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_child_changes_single_fields_of_its_base(write):
    write("optim: {lr: 1.0, betas: [0.5, 0.6]}\nfolder: base\n", "base/a.yaml")
    config = read(write("base: base/a.yaml\noptim: {lr: 2.0}\n"))
    assert config.optim == Optim(lr=2.0, betas=(0.5, 0.6))
    assert config.folder == "base"


def test_of_several_bases_the_later_one_wins_and_the_file_itself_wins_over_all(write):
    write("optim: {lr: 1.0}\nfolder: a\nshards: [a]\n", "a.yaml")
    write("folder: b\nshards: [b, b]\n", "b.yaml")
    config = read(write("base: [a.yaml, b.yaml]\nshards: [c]\n"))
    assert (config.optim.lr, config.folder, config.shards) == (1.0, "b", ["c"])


def test_a_base_is_found_beside_the_file_that_names_it(write):
    write("optim: {lr: 3.0}\n", "deep/er/a.yaml")
    write("base: er/a.yaml\n", "deep/b.yaml")
    assert read(write("base: deep/b.yaml\n")).optim.lr == 3.0


def test_objectives_of_a_child_replace_those_of_its_base(write):
    write("optim: {lr: 1.0}\nobjectives: {a: {type: red, share: 0.1}, b: {type: blue}}\n", "a.yaml")
    assert read(write("base: a.yaml\nobjectives: {a: {type: red}}\n")).objectives == {"a": Red()}


def test_an_override_edits_one_field_of_one_objective(write):
    path = write("optim: {lr: 1.0}\nobjectives: {a: {type: red, share: 0.1}, b: {type: blue}}\n")
    assert read(path, "objectives.a.share=0").objectives == {"a": Red(share=0.0), "b": Blue()}


def test_an_override_replaces_a_list(write):
    path = write("optim: {lr: 1.0}\nshards: [a, b, c]\n")
    assert read(path, "shards=[d]", "optim.betas=[0.1,0.2]") == Experiment(optim=Optim(lr=1.0, betas=(0.1, 0.2)), shards=["d"])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001"])
def test_scientific_notation_is_a_number_in_files_and_overrides(write, text: str):
    assert read(write(f"optim: {{lr: {text}}}\n")).optim.lr == 1e-4
    assert read(write("optim: {lr: 1}\n"), f"optim.lr={text}").optim.lr == 1e-4


def test_the_environment_is_read_with_and_without_a_default(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYCOCA_TEST_DATA", "/some")
    monkeypatch.delenv("SYCOCA_TEST_NONE", raising=False)
    path = write('optim: {lr: 1.0}\nshards: ["${oc.env:SYCOCA_TEST_DATA}/{000..123}.tar", "${oc.env:SYCOCA_TEST_NONE,x}"]\n')
    assert read(path).shards == ["/some/{000..123}.tar", "x"]


def test_a_variable_that_is_not_set_is_named(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SYCOCA_TEST_NONE", raising=False)
    found = message(write('optim: {lr: 1.0}\nfolder: "${oc.env:SYCOCA_TEST_NONE}/x"\n'))
    assert "folder" in found
    assert "SYCOCA_TEST_NONE" in found


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("optim: {lr: 1.0, beta: 1}\n", (), "optim.beta: unknown key, did you mean 'betas'?"),
        ("optim: {lr: 1.0}\nzzz: 1\n", (), "zzz: unknown key; known here: first, folder, objectives, optim, shards"),
        ("optim: {lr: 1.0}\n", ("optim.lrr=2",), "optim.lrr: unknown key, did you mean 'lr'?"),
        (f"{LR}objectives: {{a: {{type: blue, dept: 1}}}}\n", (), "objectives.a.dept: unknown key, did you mean 'depth'?"),
        (f"{LR}objectives: {{red: {{type: blue, x: 1}}}}\n", (), "objectives.red.x: unknown key; known here: depth, type"),
        ("optim: {lr: 1.0}\nfirst: {shar: 1}\n", (), "first.shar: unknown key, did you mean 'share'?"),
        ("optim: {betas: [1, 2]}\n", (), "optim.lr: missing, it has no default"),
        ("optim: {lr: fast}\n", (), "optim.lr: Input should be a valid number"),
        (f"{LR}objectives: {{a: {{type: red, share: x}}}}\n", (), "objectives.a.share: Input should be a valid number"),
        ("optim: {lr: 1.0}\nobjectives: {a: {type: green}}\n", (), "objectives.a: Input tag 'green'"),
        ("optim: {lr: 1.0, betas: [1]}\n", (), "optim.betas.1: missing"),
        ("optim: {lr: 1.0}\nshards: one.tar\n", (), "shards: Input should be a valid list, found 'one.tar'"),
        ("optim:\n  lr: ???\n", (), "optim.lr: Missing mandatory value"),
        ("optim: {lr: 1.0}\n", ("lr",), "override 'lr': expected key.sub=value"),
        ("optim: {lr: 1.0}\n", ("--lr=1",), "override '--lr=1': expected key.sub=value"),
        ("optim: [\n", (), "not YAML"),
        ("- 1\n", (), "expected a mapping"),
        ("base: 3\n", (), "base: expected the path of a file"),
        ("base: gone.yaml\n", (), "gone.yaml (named as `base` in "),
        ("base: main.yaml\n", (), "`base` leads back"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(write, text: str, overrides: tuple[str, ...], expected: str):
    assert expected in message(write(text), *overrides)


def test_all_mistakes_are_told_at_once(write):
    found = message(write("optim: {lr: x, beta: 1}\n"))
    assert "optim.lr:" in found
    assert "optim.beta:" in found


def test_a_missing_file_is_named(tmp_path: Path):
    assert f"no configuration file at {tmp_path / 'gone.yaml'}" in message(tmp_path / "gone.yaml")


def test_a_configuration_cannot_be_changed():
    config = Experiment(optim=Optim(lr=1.0))
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 2.0


def test_what_is_dumped_reads_back_as_the_same(write):
    config = Experiment(optim=Optim(lr=1e-4), shards=["a/{0..3}.tar"], objectives={"b": Blue(depth=3)}, first=Red())
    assert read(write(dump_config(config))) == config


@pytest.mark.parametrize("path", sorted(PRETRAIN.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_fits_together_and_dumps(path: Path, write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/data")
    config = load_config(PretrainConfig, path)
    assert config.data.transform.size == config.model.vision.image_size
    assert config.data.batch_size % config.optim.num_chunks == 0
    assert config.run.folder == f"runs/{path.relative_to(PRETRAIN).with_suffix('')}"
    assert load_config(PretrainConfig, write(dump_config(config))) == config


@pytest.mark.parametrize("path", sorted(PRETRAIN.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_says_what_it_is_and_how_it_is_run(path: Path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(header) >= 2
    assert any(str(path.relative_to(ROOT)) in line for line in header)


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_differ_from_their_base_only_in_their_objectives(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/data")
    base, own = (load_config(PretrainConfig, file) for file in (PRETRAIN / "sycoca_cc3m.yaml", path))
    same: dict[str, Any] = {"objectives": base.objectives, "run": own.run.model_copy(update={"folder": base.run.folder})}
    assert own.model_copy(update=same) == base


def test_the_ablations_are_the_rows_of_the_paper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/data")
    rows = {path.stem: load_config(PretrainConfig, path).model_dump()["objectives"] for path in ABLATIONS}
    plain = {"mask_share": 0.5, "text_guided": False}
    expected = {
        "itc": {"itc": {}},
        "coca": {"itc": {}, "ic": {"drop_share": 0.0}},
        "coca_masked_ic": {"itc": {}, "ic": {"drop_share": 0.5}},
        "coca_mim_random": {"itc": {}, "ic": {"drop_share": 0.0}, "tg_mim": {**plain, "mask": "random"}},
        "coca_mim_attentive": {"itc": {}, "ic": {"drop_share": 0.0}, "tg_mim": {**plain, "mask": "top"}},
        "coca_tg_mim_random": {"itc": {}, "ic": {"drop_share": 0.0}, "tg_mim": {"mask": "random", "text_guided": True}},
        "sycoca": {"itc": {}, "ic": {"drop_share": 0.5}, "tg_mim": {"mask": "top", "text_guided": True}},
    }
    shown = {
        row: {name: {key: rows[row][name][key] for key in fields} for name, fields in objectives.items()}
        for row, objectives in expected.items()
    }
    assert shown == expected
    assert {row: list(objectives) for row, objectives in rows.items()} == {row: list(names) for row, names in expected.items()}
    weights = {"itc": 1.0, "ic": 2.0, "tg_mim": 1.0}
    assert all(member["weight"] == weights[name] for row in rows.values() for name, member in row.items())


def test_parsing_names_its_source():
    with pytest.raises(ConfigError, match=r"^options: optim: missing"):
        parse_config(Experiment, {}, source="options")
