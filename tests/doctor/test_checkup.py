"""Each kind of fault, seeded into small shards, files, models and settings, is found and named; a sound experiment passes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import ABLATION_ROWS, IC, ITC, VOCAB_SIZE, build_batch, build_task
from PIL import Image

from sycoca.config import load_config
from sycoca.data.tokenizer import ClipTokenizer, Tokenizer, build_tokenizer, train_word_tokenizer
from sycoca.doctor.budget import activation_bytes, check_memory, state_bytes
from sycoca.doctor.checkup import CheckUp
from sycoca.doctor.launch_file import Launch, check_launch
from sycoca.doctor.masks import check_masks
from sycoca.doctor.report import Check
from sycoca.doctor.settings import check_settings
from sycoca.doctor.shards import check_held_out, check_shards, read_facts
from sycoca.doctor.tokens import check_tokenizer
from sycoca.models.blocks import SelfAttention
from sycoca.models.sycoca import SyCoCa
from sycoca.train.pretrain import PretrainConfig
from tests.data.shard_maker import make_pair, write_shard

ROOT = Path(__file__).parents[2]
COLOURS = ["red", "green", "blue", "white", "black", "grey", "brown", "pink", "golden", "dark", "pale", "bright"]


def photo(number: int, size: int = 40) -> bytes:
    """A flat colour, which is quick to learn."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number * 20 % 255, number * 67 % 255, number * 131 % 255)).save(buffer, "PNG")
    return buffer.getvalue()


def write_data(folder: Path, *, first: int = 0) -> Path:
    """Two sound shards of six pairs each."""
    folder.mkdir(parents=True)
    for shard in range(2):
        members = []
        for number in range(first + 6 * shard, first + 6 * shard + 6):
            members += [(f"key_{number}.png", photo(number)), (f"key_{number}.txt", f"a {COLOURS[number % 12]} photo".encode())]
        write_shard(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and held-out shards and a word tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train")
    write_data(folder / "val", first=100)
    train_word_tokenizer([f"a {colour} photo" for colour in COLOURS], folder / "tokenizer")
    return folder


def load(data: Path, *overrides: str) -> PretrainConfig:
    """The smoke experiment on these shards."""
    paths = [
        f"data.shards=[{data / 'train'}]", f"evaluate.shards=[{data / 'val'}]", f"data.tokenizer.name={data / 'tokenizer'}",
        f"run.folder={data / 'run'}", "data.max_tokens=12",
    ]  # fmt: skip
    return load_config(PretrainConfig, ROOT / "configs/pretrain/smoke.yaml", [*paths, *overrides])


def look(config: PretrainConfig, *, num_processes: int = 1, is_all: bool = True, masks: bool = False) -> dict[str, Check]:
    """The findings about the training shards by name."""
    facts = read_facts(config.data, build_tokenizer(config.data.tokenizer.name), is_all=is_all)
    found = check_shards(facts, config.data, num_processes=num_processes, masks_duplicates=masks)
    return {check.name: check for check in found}


def add_shard(data: Path, folder: Path, members: list[tuple[str, bytes]]) -> str:
    """The override that reads the sound shards and one more."""
    write_shard(folder / "more.tar", members)
    return f"data.shards=[{data / 'train'},{folder / 'more.tar'}]"


def test_sound_shards_pass(data: Path):
    assert {check.status for check in look(load(data)).values()} == {"ok"}


def test_a_broken_tar_and_damaged_images_are_named_with_their_shard(data: Path, tmp_path: Path):
    override = add_shard(data, tmp_path, make_pair("damaged", image=b"\xff\xd8 no image"))
    check = look(load(data, override))["shards"]
    assert check.status == "warning" and "1 corrupt_image" in check.says and "more.tar" in check.says
    whole = (data / "train" / "0.tar").read_bytes()
    (tmp_path / "more.tar").write_bytes(whole[: len(whole) // 2])
    check = look(load(data, override))["shards"]
    assert check.status == "wrong" and "truncated_tar" in check.says and "1 broken tar" in check.says


def test_keys_that_stand_in_two_shards_are_named(data: Path, tmp_path: Path):
    override = add_shard(data, tmp_path, make_pair("key_3", image=photo(3)))
    check = look(load(data, override))["duplicate keys"]
    assert check.status == "warning" and "key_3" in check.says


def test_captions_that_repeat_are_false_negatives_unless_they_are_masked_out(data: Path, tmp_path: Path):
    members = [member for n in range(5) for member in make_pair(f"more_{n}", image=photo(n), caption=b"a red photo")]
    config = load(data, add_shard(data, tmp_path, members))
    check = look(config)["duplicate captions"]
    assert check.status == "warning" and "6 times 'a red photo'" in check.says and "mask_duplicates=true" in check.says
    assert look(config, masks=True)["duplicate captions"].status == "ok"


def test_small_images_and_long_captions_are_measured_against_the_settings(data: Path):
    found = look(load(data, "data.transform.size=64", "data.max_tokens=4"))
    assert found["image sizes"].status == "warning" and "100.0% are below data.transform.size = 64" in found["image sizes"].says
    assert found["caption lengths"].status == "wrong" and "raise data.max_tokens" in found["caption lengths"].says


def test_too_few_pairs_or_shards_for_the_workers_of_all_processes_are_found(data: Path):
    assert look(load(data), num_processes=2)["pairs"].status == "ok"
    assert "read the same files" in look(load(data, "data.num_workers=3"), num_processes=3)["pairs"].says
    assert "a step sees pairs twice" in look(load(data), num_processes=4)["pairs"].says
    check = look(load(data, "data.num_workers=4"), num_processes=4)["pairs"]
    assert check.status == "wrong" and "16 loader workers" in check.says


def test_a_sample_of_shards_is_spread_over_all_of_them(tmp_path: Path):
    for number in range(20):
        write_shard(tmp_path / f"{number:02d}.tar", make_pair(f"key_{number}", image=photo(number)))
    config = load(tmp_path, f"data.shards=[{tmp_path}]").data
    facts = read_facts(config, None, is_all=False)
    assert (facts.num_shards, facts.num_read, facts.num_estimated) == (20, 8, 20)
    assert "key_17" in facts.keys and "key_0" in facts.keys


def test_held_out_shards_that_are_trained_on_are_found(data: Path):
    config = load(data, f"evaluate.shards=[{data / 'train'}/1.tar]")
    check = check_held_out(config.data, config.evaluate)
    assert check.status == "wrong" and "1.tar" in check.says
    assert check_held_out(load(data).data, load(data).evaluate).status == "ok"


def test_a_tokenizer_that_does_not_know_the_words_is_found(data: Path):
    tokenizer = build_tokenizer(data / "tokenizer")
    assert {check.status for check in check_tokenizer(tokenizer, ["a red photo"], 12)} == {"ok"}
    check = check_tokenizer(tokenizer, ["two zebras", "a red gnu"], 12)[1]
    assert check.status == "wrong" and "zebras" in check.says
    assert {check.status for check in check_tokenizer(ClipTokenizer(), ["Two zebras, in the sun!"], 12)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"pad": 99}, "wrong", "pad outside the vocabulary"),
        ({"eos": 3}, "wrong", "not bos ... eos"),
    ],
)
def test_special_tokens_that_cannot_work_are_found(changes: dict, status: str, says: str, data: Path):
    tokenizer: Tokenizer = build_tokenizer(data / "tokenizer")
    original = tokenizer.encode("a photo", 8)
    for name, token in changes.items():
        setattr(tokenizer, name, token)
    tokenizer.encode = lambda text, limit: original  # pyright: ignore[reportAttributeAccessIssue]
    check = check_tokenizer(tokenizer, [], 12)[0]
    assert check.status == status and says in check.says


def masks_of(task: Any) -> dict[str, Check]:
    return {check.name: check for check in check_masks(task, vocab_size=VOCAB_SIZE)}


@pytest.mark.parametrize("row", ["sycoca", "coca", "itc", "ic", "mim_random"])
def test_a_sound_model_leaks_nothing(row: str):
    found = masks_of(build_task(ABLATION_ROWS[row]))
    assert found.keys() == {"causality", "padding", "dropped patches"}
    assert {check.status for check in found.values()} == {"ok"}


@pytest.mark.parametrize("tower", ["text", "text_decoder"])
def test_a_tower_that_sees_later_words_is_found(tower: str):
    task = build_task(ABLATION_ROWS["coca"])
    for module in task.model.get_submodule(tower).modules():
        if isinstance(module, SelfAttention):
            module.is_causal = False
    assert masks_of(task)["causality"].status == "wrong"


def test_padding_that_matters_is_found(monkeypatch: pytest.MonkeyPatch):
    task = build_task({"itc": ITC, "ic": IC})
    encode = task.model.text.forward  # pyright: ignore[reportOptionalMemberAccess]

    def leaky(token, length):
        state = encode(token, length)[0]
        return state, state.mean(dim=1)

    monkeypatch.setattr(task.model.text, "forward", leaky)
    check = masks_of(task)["padding"]
    assert check.status == "wrong" and "loss of itc:" in check.says


def test_dropped_patches_that_are_seen_are_found(monkeypatch: pytest.MonkeyPatch):
    task = build_task(ABLATION_ROWS["sycoca"])
    see = task.model.vision.forward

    def leaky(image, visible_BK=None, is_hidden_BP=None):
        patch, cls = see(image, visible_BK, is_hidden_BP)
        return (patch if visible_BK is None else patch + see(image)[0].mean(1, keepdim=True)), cls

    monkeypatch.setattr(task.model.vision, "forward", leaky)
    assert masks_of(task)["dropped patches"].status == "wrong"


def write_launch(folder: Path, *, zero: dict | None = None, **changes: Any) -> Path:
    """A sound ZeRO launch file of two processes, changed."""
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | (zero or {})))
    plugin = {"deepspeed_config_file": str(folder / "zero.json"), "zero3_init_flag": False} | changes.pop("plugin", {})
    content = {"distributed_type": "DEEPSPEED", "num_processes": 1, "num_machines": 1, "deepspeed_config": plugin} | changes
    (folder / "launch.yaml").write_text(yaml.safe_dump(content))
    return folder / "launch.yaml"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mixed_precision": "bf16"}, "run.precision of the experiment says it"),
        ({"distributed_type": "MEGATRON_LM"}, "MEGATRON_LM is not supported"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "fsdp_version: set it to 2"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}}, "fsdp_offload_params: set it to false"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "optim.average_decay: FSDP2"),
        ({"distributed_type": "NO", "num_processes": 4}, "NO starts one process, not 4"),
        ({"zero": {"bf16": {"enabled": True}}}, "bf16: remove it; run.precision says it"),
        ({"zero": {"train_batch_size": 8}}, "train_batch_size: remove it; data.batch_size says it"),
        ({"zero": {"wall_clock_breakdown": True}}, "wall_clock_breakdown: remove it; it holds ZeRO settings only"),
        ({"zero": {"zero_optimization": {"stage": 4}}}, "stage: expected 1, 2 or 3, found 4"),
        ({"plugin": {"gradient_clipping": 1.0}}, "deepspeed_config.gradient_clipping: remove it"),
        ({"plugin": {"zero3_init_flag": True}}, "zero3_init_flag: set it to false"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_config: remove it; run.compile says it"),
        ({"zero": {"zero_optimization": {"stage": 3}}}, "optim.average_decay: ZeRO-3"),
    ],
)
def test_what_a_launch_file_should_not_say_is_named(changes: dict, says: str, data: Path, tmp_path: Path):
    found = check_launch(write_launch(tmp_path, **changes), load(data, "optim.average_decay=0.9"))
    assert says in " ".join(check.says for check in found if check.status == "wrong")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch/accelerate").glob("*.yaml")))
def test_the_launch_files_of_this_repository_pass(name: str, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found = check_launch(Path(f"launch/accelerate/{name}.yaml"), load(data))
    assert [check for check in found if check.status == "wrong"] == []


@pytest.mark.parametrize(
    ("override", "status", "says"),
    [
        ("optim.num_chunks=3", "wrong", "does not divide into 3 chunks"),
        ("data.transform.size=64", "wrong", "they must be equal"),
        ("optim.warmup_steps=100", "warning", "optim.warmup_steps = 100 is not below"),
        ("run.checkpoint_every=0", "warning", "nothing is saved before the end"),
        ("optim.clip_norm=0", "wrong", "leaves nothing of the gradient"),
    ],
)
def test_settings_that_do_not_go_together_are_found(override: str, status: str, says: str, data: Path):
    [check] = [check for check in check_settings(load(data, override)) if says in check.says]
    assert check.status == status


def test_memory_of_weights_and_optimiser_is_split_as_zero_splits_it(data: Path):
    task, config = build_task({"itc": ITC}), load(data)
    num_bytes = 4 * sum(parameter.numel() for parameter in task.parameters())
    sizes = [state_bytes(task, config, Launch(4, stage)) / num_bytes for stage in (0, 1, 2, 3)]
    assert sizes == pytest.approx([4, 2 + 3 / 4, 1 + 4 / 4, 5 / 4])
    others = (Launch(4, is_fsdp=True), Launch(4, 2, is_offloaded=True))
    assert [state_bytes(task, config, launch) / num_bytes for launch in others] == pytest.approx([4 / 4, 1 + 1 / 4])
    assert check_memory(1e15, 0, torch.device("cpu")).status == "wrong"


def test_activations_grow_with_the_batch_and_shrink_with_chunks(data: Path):
    task, batch = build_task(ABLATION_ROWS["coca"]), build_batch(8)
    one, four, chunked = (
        activation_bytes(task, batch, load(data, *overrides), torch.device("cpu"))
        for overrides in (["data.batch_size=8"], ["data.batch_size=32"], ["data.batch_size=8", "optim.num_chunks=2"])
    )
    assert one > batch["image"].nbytes
    assert 3 * one < four < 4.1 * one
    assert chunked == pytest.approx(one / 2, rel=0.2)


def check_up(config: PretrainConfig) -> CheckUp:
    checkup = CheckUp(config, lambda check: None)
    checkup.run()
    return checkup


@pytest.mark.slow
def test_a_sound_experiment_passes_and_a_model_that_cannot_learn_is_found(data: Path):
    sound = check_up(load(data, "optim.num_steps=600", "run.checkpoint_every=50"))
    assert [check for check in sound.checks if check.status == "wrong"] == []
    assert {"memory", "time", "waiting for data", "checkpoints", "overfitting"} <= {check.name for check in sound.checks}
    assert sound.figures["hours"] == pytest.approx(sound.figures["seconds_per_step"] * 600 / 3600)
    stuck = check_up(load(data, "optim.lr=1e-9"))
    assert [check.name for check in stuck.checks if check.status == "wrong"] == ["overfitting"]


def test_what_is_wrong_with_the_data_keeps_the_model_from_being_built(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SyCoCa, "__init__", lambda *args, **options: pytest.fail("the model was built"))
    checkup = check_up(load(data, "data.shards=[gone.tar]", f"data.tokenizer.name={data / 'gone'}"))
    wrong = " ".join(check.says for check in checkup.checks if check.status == "wrong")
    assert "gone.tar: no such shard" in wrong and "gone: expected" in wrong
    assert checkup.checks[-1].says.startswith("not looked at")


@pytest.mark.slow
def test_the_tool_prints_a_table_a_result_and_a_status_that_says_whether_all_is_well(data: Path):
    command = [sys.executable, "tools/doctor.py", "configs/pretrain/smoke.yaml", "--launch", "launch/accelerate/zero2.yaml"]
    overrides = [f"{name}.shards=[{data / 'train'}]" for name in ("data", "evaluate")]
    overrides += [f"data.tokenizer.name={data / 'tokenizer'}"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *overrides], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert [check["name"] for check in result["checks"] if check["status"] == "wrong"] == ["held-out shards"]
    assert "held-out shards" in done.stderr and "take them out of data.shards" in done.stderr
