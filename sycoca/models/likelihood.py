"""How probable given captions are: the log-probability of each of their tokens, by teacher forcing."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sycoca.models.sycoca import SyCoCa
from sycoca.models.vocabulary import IGNORED, ROWS_A_CHUNK


def token_log_probs(model: SyCoCa, patch_NPD: Tensor, token_NL: Tensor, length_N: Tensor) -> Tensor:
    """N (L - 1) float32, in nats: at place l that of token l + 1 after those up to l; 0 behind a caption's last token.

    With gradient, unlike the summed cross-entropy, for each token by itself: logits of ROWS_A_CHUNK tokens are held at a time
    and made again in the backward pass.
    """
    assert model.text is not None and model.text_decoder is not None, "the model was built without a text decoder"
    state_NLD = model.text_decoder.stack(model.text(token_NL, length_N)[0][:, :-1], patch_NPD)
    place_L = torch.arange(state_NLD.shape[1], device=token_NL.device)
    label_NL = token_NL[:, 1:].masked_fill(place_L >= length_N[:, None] - 1, IGNORED)
    # as many chunks on every rank, whatever the captions' lengths: ZeRO-3 gathers the vocabulary's weights in each
    rows = max(1, ROWS_A_CHUNK // label_NL.shape[1])
    chunks = zip(state_NLD.split(rows), label_NL.split(rows), strict=True)
    parts = [checkpoint(_label_log_probs, model.text_decoder.vocabulary, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _label_log_probs(vocabulary: nn.Module, state_NLD: Tensor, label_NL: Tensor) -> Tensor:
    logit_NLV = vocabulary(state_NLD).float()
    return -F.cross_entropy(logit_NLV.mT, label_NL, ignore_index=IGNORED, reduction="none")
