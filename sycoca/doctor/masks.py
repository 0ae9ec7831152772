"""What must not leak: later words into earlier ones, padding into anything, dropped patches into what is left."""

from collections.abc import Callable

import torch
from torch import Tensor

from sycoca.doctor.report import Check
from sycoca.models.sycoca import SyCoCa
from sycoca.train.task import PretrainTask
from sycoca.types import Batch

_MAX_DIFFERENCE = 1e-4
"""Relative to the largest number compared, in float32; a leak is of another order."""
_NUM_PAIRS, _MOST_TOKENS = 2, 12


@torch.no_grad()
def check_masks(task: PretrainTask, *, vocab_size: int, seed: int = 0) -> list[Check]:
    """Every finding that this model allows, on random images and tokens; the task is left in evaluation mode."""
    task.eval()
    generator = torch.Generator().manual_seed(seed)
    model, device = task.model, next(task.parameters()).device
    num_tokens = min(_MOST_TOKENS, model.max_tokens - 1)
    size = model.config.vision.image_size
    image = torch.randn(_NUM_PAIRS, 3, size, size, generator=generator).to(device)
    token_BL = torch.randint(vocab_size, (_NUM_PAIRS, num_tokens), generator=generator).to(device)
    length_B = torch.tensor([num_tokens, min(3, num_tokens)]).to(device)
    batch = Batch(image=image, token=token_BL, length=length_B, key=["first", "second"], position={})
    found = [check_causality(model, token_BL, vocab_size)] if model.text is not None else []
    return [*found, check_padding(task, batch, vocab_size), check_dropped_patches(model, image)]


def check_causality(model: SyCoCa, token_BL: Tensor, vocab_size: int) -> Check:
    """Changing token t + 1 changes no logit (without a decoder: no text state) up to t."""
    length_B = torch.full((len(token_BL),), token_BL.shape[1], device=token_BL.device)
    memory = torch.randn(len(token_BL), model.vision.num_patches, model.vision.width, device=token_BL.device)

    def predict(token: Tensor) -> Tensor:
        assert model.text is not None
        state = model.text(token, length_B)[0]
        return state if model.text_decoder is None else model.text_decoder(state, memory)

    before = predict(token_BL)
    for place in sorted({1, token_BL.shape[1] // 2, token_BL.shape[1] - 1}):
        changed = token_BL.clone()
        changed[:, place] = (changed[:, place] + 1) % vocab_size
        after = predict(changed)
        if differ(before[:, :place], after[:, :place]):
            return Check(
                "causality", "wrong", f"changing token {place} changes what is predicted before it: the model sees the answer; "
                "its text attention must be causal (models/blocks.py, is_causal)"
            )  # fmt: skip
        if not differ(before[:, place:], after[:, place:]):
            return Check("causality", "wrong", f"changing token {place} changes nothing at all: the text is not read")
    return Check("causality", "ok", "changing a token changes no prediction before it")


def check_padding(task: PretrainTask, batch: Batch, vocab_size: int) -> Check:
    """Other ids in the padding, and more of it, change no objective's loss."""
    other = batch.copy()
    room = min(3, task.model.max_tokens - batch["token"].shape[1])
    noise = torch.randint_like(torch.nn.functional.pad(batch["token"], (0, room)), vocab_size)
    is_real = torch.arange(noise.shape[1], device=noise.device) < batch["length"][:, None]
    other["token"] = torch.where(is_real, torch.nn.functional.pad(batch["token"], (0, room)), noise)
    before, after = (same_random(lambda batch=batch: task.results(batch)) for batch in (batch, other))
    changed = [name for name in before if differ(before[name][0], after[name][0])]
    if not changed:
        return Check("padding", "ok", f"neither ids nor length of the padding change {', '.join(before)}")
    return Check(
        "padding", "wrong", f"what stands in the padding changes the loss of {', '.join(changed)}: lengths must mask it, in "
        "the objective and wherever it reads the text"
    )  # fmt: skip


def check_dropped_patches(model: SyCoCa, image_BCHW: Tensor) -> Check:
    """Other pixels in the dropped half leave the encoding of the visible half as it is; in the visible half they do not."""
    num_patches, size = model.vision.num_patches, model.vision.patch_size
    visible_BK = torch.arange(0, num_patches, 2, device=image_BCHW.device).expand(len(image_BCHW), -1)
    columns = image_BCHW.shape[-1] // size
    is_visible = torch.zeros(num_patches, device=image_BCHW.device).index_fill_(0, visible_BK[0], 1.0)
    is_visible_HW = is_visible.view(-1, columns).repeat_interleave(size, 0).repeat_interleave(size, 1).bool()
    noise = torch.randn_like(image_BCHW)
    before = model.vision(image_BCHW, visible_BK=visible_BK)[0]
    if differ(before, model.vision(torch.where(is_visible_HW, image_BCHW, noise), visible_BK=visible_BK)[0]):
        return Check(
            "dropped patches", "wrong", "pixels of dropped patches reach the encoding of the visible ones: patches must be "
            "dropped before the first block (models/vision.py, KeepPatches)"
        )  # fmt: skip
    if not differ(before, model.vision(torch.where(is_visible_HW, noise, image_BCHW), visible_BK=visible_BK)[0]):
        return Check("dropped patches", "wrong", "pixels of visible patches change nothing: the image is not read")
    return Check("dropped patches", "ok", "pixels of dropped patches cannot reach the encoding of the visible ones")


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two results differ by more than rounding."""
    scale = float(first.abs().max()) + 1e-12
    return bool(((first - second).abs().max() > _MAX_DIFFERENCE * scale).item())


def same_random(call: Callable[[], dict[str, tuple[Tensor, dict[str, Tensor]]]]) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """The function's result with random masks drawn from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return call()
