"""What lies in the shards: damage, duplicates, image sizes and caption lengths, of a sample of them or of all."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from sycoca.data.decode import SampleError, decode_image, list_captions, read_meta
from sycoca.data.pipeline import DataConfig
from sycoca.data.position import DropLog
from sycoca.data.shards import RawSample, expand_shards, read_samples
from sycoca.data.tokenizer import Tokenizer
from sycoca.doctor.report import Check, grade, judge
from sycoca.train.validation import EvaluateConfig
from sycoca.types import DataError

_SHARDS_SAMPLED = 8
_DECODED_A_SHARD = 100
"""Images decoded in each shard of a sample; all of them where all shards are read."""
_BROKEN = {"corrupt_tar", "truncated_tar", "unreadable_tar"}
_MAX_DUPLICATE_SHARE = 0.1
_MAX_CUT_SHARE, _MOST_CUT_SHARE = 0.05, 0.5
_MAX_SMALL_SHARE = 0.2
_SHOWN = 3


@dataclass
class ShardFacts:
    """Everything that was seen of the shards read."""

    num_shards: int
    num_read: int
    num_pairs: int = 0
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """By shard, the reasons why samples could not be used."""
    keys: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    num_tokens: list[int] = field(default_factory=list)
    shortest_sides: list[int] = field(default_factory=list)

    @property
    def num_dropped(self) -> int:
        """Samples and shards that could not be used."""
        return sum(reasons.total() for reasons in self.dropped.values())

    @property
    def num_estimated(self) -> int:
        """Pairs in all shards, if those that were read are like the others."""
        return round(self.num_pairs * self.num_shards / self.num_read)


def read_facts(config: DataConfig, tokenizer: Tokenizer | None, *, is_all: bool) -> ShardFacts:
    """Read shards spread evenly over the list, or all. Raises DataError where there are none."""
    shards = expand_shards(config.shards, allow_pipe=config.allow_pipe)
    num_read = len(shards) if is_all else min(len(shards), _SHARDS_SAMPLED)
    facts = ShardFacts(len(shards), num_read)
    for place in range(num_read):
        shard = shards[place * len(shards) // num_read]
        for number, raw in enumerate(_read(shard, config, facts)):
            _note(raw, config, facts, tokenizer, is_decoded=is_all or number < _DECODED_A_SHARD)
    return facts


def _read(shard: str, config: DataConfig, facts: ShardFacts) -> Iterator[RawSample]:
    drops = DropLog(max_bad_share=1.0)
    yield from read_samples(shard, drops, max_bytes=config.max_bytes, is_mine=lambda: True)
    facts.dropped.setdefault(shard, Counter()).update(drops.take())


def _note(raw: RawSample, config: DataConfig, facts: ShardFacts, tokenizer: Tokenizer | None, *, is_decoded: bool) -> None:
    try:
        captions = list_captions(raw.members, read_meta(raw.members), config.captions)
        if is_decoded:
            image = decode_image(raw.image, max_pixels=config.max_pixels, max_bytes=config.max_bytes, draft_size=0)
            facts.shortest_sides.append(min(image.size))
    except SampleError as error:
        facts.dropped.setdefault(raw.shard, Counter())[error.reason] += 1
        return
    facts.num_pairs += 1
    facts.keys[raw.key] += 1
    facts.captions.update(captions)
    if tokenizer is not None:
        facts.num_tokens += [len(tokenizer.encode(text, config.max_tokens + 1)) for text in captions]


def check_shards(facts: ShardFacts, config: DataConfig, *, num_processes: int, masks_duplicates: bool) -> list[Check]:
    """Every finding about the training shards; `masks_duplicates`: equal captions are no negatives of each other."""
    if facts.num_pairs == 0:
        raise DataError(f"no usable pair in {facts.num_read} shards: {_worst(facts) or 'they are empty'}")
    found = [_check_damage(facts, config), _check_counts(facts, config, num_processes), _check_keys(facts)]
    found += [_check_captions(facts, masks_duplicates), _check_sizes(facts, config.transform.size)]
    return [*found, _check_lengths(facts, config.max_tokens)] if facts.num_tokens else found


def check_held_out(data: DataConfig, evaluate: EvaluateConfig) -> Check:
    """That held-out shards exist and are not trained on. Raises DataError where one is missing."""
    if not evaluate.shards:
        return Check("held-out shards", "warning", "no evaluate.shards: no best checkpoint is chosen; name held-out shards")
    trained, held_out = (
        {str(Path(shard).resolve()) for shard in expand_shards(shards, allow_pipe=data.allow_pipe)}
        for shards in (data.shards, evaluate.shards)
    )
    both = sorted(trained & held_out)
    says = f"{len(held_out)} held-out shards" + (f", {len(both)} of them trained on as well ({both[0]})" if both else "")
    return judge("held-out shards", "wrong" if both else "ok", says, "take them out of data.shards")


def _check_damage(facts: ShardFacts, config: DataConfig) -> Check:
    broken = [shard for shard, reasons in facts.dropped.items() if reasons.keys() & _BROKEN]
    share = facts.num_dropped / (facts.num_dropped + facts.num_pairs)
    says = f"{facts.num_read} of {facts.num_shards} shards read, {facts.num_pairs} pairs"
    if not facts.num_dropped:
        return Check("shards", "ok", f"{says}, nothing damaged")
    says += f", {facts.num_dropped} could not be used ({share:.1%}); {_worst(facts)}"
    if broken:
        return Check("shards", "wrong", f"{says}; {len(broken)} broken tar: fetch or write it again")
    mend = f"more than data.max_bad_share = {config.max_bad_share:.0%} stop a run: repair or remove the file"
    return judge("shards", grade(share, warn_above=0, wrong_above=config.max_bad_share), says, mend)


def _worst(facts: ShardFacts) -> str:
    shard, reasons = max(facts.dropped.items(), key=lambda item: item[1].total(), default=("", Counter()))
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    return f"worst: {shard} ({listed})" if reasons else ""


def _check_counts(facts: ShardFacts, config: DataConfig, num_processes: int) -> Check:
    num_streams = num_processes * max(1, config.num_workers)
    num_whole_batch = config.batch_size * num_processes
    says = f"about {facts.num_estimated} pairs for {num_streams} loader workers, {num_whole_batch} pairs a step"
    if facts.num_estimated < num_streams:
        return Check("pairs", "wrong", f"{says}: some workers would find nothing; lower data.num_workers, or add data")
    if facts.num_estimated < num_whole_batch:
        return Check("pairs", "warning", f"{says}: a step sees pairs twice; lower data.batch_size, or add data")
    if facts.num_shards < num_streams:
        return Check(
            "pairs", "warning", f"{says}: but {facts.num_shards} shards, so that workers read the same files; write more, "
            "smaller shards (tools/make_shards.py --samples-per-shard), or lower data.num_workers"
        )  # fmt: skip
    return Check("pairs", "ok", says)


def _check_keys(facts: ShardFacts) -> Check:
    repeated = [key for key, number in facts.keys.items() if number > 1]
    says = f"{len(facts.keys)} keys, each once" if not repeated else f"{len(repeated)} keys stand in several shards"
    says += f" ({', '.join(repeated[:_SHOWN])})" if repeated else ""
    mend = "a key names an image: give each its own, or remove shards that are there twice"
    return judge("duplicate keys", "warning" if repeated else "ok", says, mend)


def _check_captions(facts: ShardFacts, masks_duplicates: bool) -> Check:
    num = facts.captions.total()
    [(text, times)] = facts.captions.most_common(1)
    share = 1 - len(facts.captions) / num
    says = f"{share:.1%} of {num} captions repeat another" + (f"; {times} times {text!r}" if times > 1 else "")
    status = "ok" if masks_duplicates else grade(share, warn_above=_MAX_DUPLICATE_SHARE)
    mend = "they are false negatives of each other: set objectives.itc.mask_duplicates=true, or filter the captions"
    return judge("duplicate captions", status, says, mend)


def _check_sizes(facts: ShardFacts, num_pixels: int) -> Check:
    share = sum(side < num_pixels for side in facts.shortest_sides) / len(facts.shortest_sides)
    says = f"shortest sides from {min(facts.shortest_sides)}, median {median(facts.shortest_sides):.0f} pixels"
    says += f"; {share:.1%} are below data.transform.size = {num_pixels}"
    mend = "they are blown up: fetch larger images, or lower data.transform.size and model.vision.image_size"
    return judge("image sizes", grade(share, warn_above=_MAX_SMALL_SHARE), says, mend)


def _check_lengths(facts: ShardFacts, max_tokens: int) -> Check:
    share = sum(num > max_tokens for num in facts.num_tokens) / len(facts.num_tokens)
    says = f"median {median(facts.num_tokens):.0f} tokens; {share:.1%} are cut at data.max_tokens = {max_tokens}"
    status = grade(share, warn_above=_MAX_CUT_SHARE, wrong_above=_MOST_CUT_SHARE)
    return judge("caption lengths", status, says, "raise data.max_tokens, or shorten the captions")
