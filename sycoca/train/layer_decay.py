"""Layer-wise decay of the learning rate: the deeper below the output a layer lies, the less it moves (ELECTRA, BEiT)."""

from collections.abc import Iterable, Sequence

from torch import nn

from sycoca.models.sycoca import SyCoCa


def layer_scales(model: SyCoCa, decay: float) -> dict[nn.Parameter, float]:
    """The factor of each encoder's and decoder's parameter: decay ** (number of layers above it).

    The image tower counts its own layers; text encoder and text decoder count as one tower. Embeddings are the layer below the
    first block; what lies above the last block (norms, projections, vocabulary) keeps the full rate.
    """
    if decay == 1.0:
        return {}
    scales = _tower([model.vision.vit], list(model.vision.vit.blocks), [model.vision.vit.norm], decay)
    if model.text is not None:
        blocks, above = list(model.text.stack.blocks), [model.text.stack.norm]
        if model.text_decoder is not None:
            blocks += list(model.text_decoder.stack.blocks)
            above = [model.text_decoder.stack.norm]
        scales |= _tower([model.text], blocks, above, decay)
    return scales


def _tower(
    embeddings: Iterable[nn.Module], blocks: Sequence[nn.Module], above: Iterable[nn.Module], decay: float
) -> dict[nn.Parameter, float]:
    """Later entries overrule earlier ones: a tower as a whole counts as embedding, then its blocks, then what is above."""
    scales = {parameter: decay ** (len(blocks) + 1) for module in embeddings for parameter in module.parameters()}
    for number, block in enumerate(blocks):
        scales |= dict.fromkeys(block.parameters(), decay ** (len(blocks) - number))
    return scales | {parameter: 1.0 for module in above for parameter in module.parameters()}
