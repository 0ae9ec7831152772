"""One step of captioning with cached keys and values, in the form that `generation.decode` calls."""

from torch import Tensor

from sycoca.models.blocks import AttentionCache
from sycoca.models.sycoca import SyCoCa


class CaptionStep:
    """Next-token logits for captions of the given patches; holds the cache of one decoding run."""

    def __init__(self, model: SyCoCa, patch_BPD: Tensor):
        assert model.text is not None and model.text_decoder is not None, "the model was built without a text decoder"
        self.text, self.decoder = model.text, model.text_decoder
        self.memory = patch_BPD
        self.text_caches = [AttentionCache() for _ in self.text.stack.blocks]
        self.decoder_caches = [AttentionCache() for _ in self.decoder.stack.blocks]
        self.num_past = 0

    def __call__(self, token_NT: Tensor, source_N: Tensor | None) -> Tensor:
        """NV logits after the last of the new tokens; `source_N` says which row of the last call each row continues."""
        if source_N is not None:
            for cache in (*self.text_caches, *self.decoder_caches):
                cache.reorder(source_N)  # the memory's keys and values too: after the first call it is not read again
        token_NTD = self.text.step(token_NT, self.text_caches, self.num_past)
        self.num_past += token_NT.shape[1]
        state = self.decoder.stack(token_NTD, self.memory, caches=self.decoder_caches)
        return self.decoder.vocabulary(state[:, -1])
