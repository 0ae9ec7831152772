"""Every experiment of retrieval and captioning that is shipped."""

from pathlib import Path

import pytest

from sycoca.config import dump_config, load_config
from sycoca.finetune.captioning import FinetuneCaptioningConfig, check
from sycoca.finetune.retrieval import FinetuneRetrievalConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "finetune"
CAPTIONING, RETRIEVAL = (sorted(FOLDER.glob(f"{task}_*.yaml")) for task in ("captioning", "retrieval"))
NUM_KARPATHY_PAIRS = {"coco": 566_747, "flickr30k": 145_000}


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/data")


def load(path: Path) -> FinetuneCaptioningConfig | FinetuneRetrievalConfig:
    return load_config(FinetuneCaptioningConfig if path in CAPTIONING else FinetuneRetrievalConfig, path)


@pytest.mark.parametrize("path", [*CAPTIONING, *RETRIEVAL], ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_dumps_and_says_how_it_is_run(path: Path, tmp_path: Path):
    config = load(path)
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(type(config), tmp_path / "dumped.yaml") == config
    if isinstance(config, FinetuneCaptioningConfig):
        check(config)
    assert config.run.folder == f"runs/{path.stem}"
    assert config.start.image_size in (None, config.data.transform.size)
    header = " ".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    task = "captioning" if path in CAPTIONING else "retrieval"
    assert f"tools/finetune_{task}.py" in header and f"configs/finetune/{path.name}" in header and "Hardware:" in header


@pytest.mark.parametrize(("name", "num_processes", "num_epochs"), [
    ("retrieval_coco", 8, 15), ("retrieval_flickr30k", 8, 20), ("captioning_coco", 8, 10),
])  # fmt: skip
def test_steps_are_the_epochs_that_the_header_says(name: str, num_processes: int, num_epochs: int):
    config = load(FOLDER / f"{name}.yaml")
    num_pairs = config.optim.num_steps * config.data.batch_size * num_processes
    assert num_pairs / NUM_KARPATHY_PAIRS[name.split("_")[1]] == pytest.approx(num_epochs, rel=0.01)


def test_the_second_stage_goes_on_from_the_first():
    for name in ("captioning_coco", "captioning_flickr8k"):
        first, second = load(FOLDER / f"{name}.yaml"), load(FOLDER / f"{name}_scst.yaml")
        assert isinstance(second, FinetuneCaptioningConfig) and second.stage == "self_critical"
        assert second.start.checkpoint == first.run.folder
        assert second.data.shards == first.data.shards
