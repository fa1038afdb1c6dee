"""An exact weighted sum of adapters on one base."""

from collections.abc import Mapping

import torch
from peft import PeftModel

from lola_ft.adapters.load_save import adapter_weights, put_weights
from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.errors import AdapterError, UserError
from lola_ft.families import architecture_of


def combine_adapters(model: PeftModel, shares: Mapping[str, float], name: str) -> PeftModel:
    """Add an adapter whose update is the weighted sum of other adapters' updates, and make it the active one.

    The factors are put side by side, so that the new rank is the sum of the ranks and the sum is exact.

    Args:
        shares: The weight of each adapter, by name.
        name: Name of the new adapter.

    Raises:
        AdapterError: If one of the adapters has more than plain LoRA.
    """
    joined = AdapterWeights(architecture_of(model.config))
    for adapter, share in shares.items():
        if adapter not in model.peft_config:
            raise UserError(f"This model has no adapter '{adapter}'; it has {', '.join(model.peft_config)}.")
        weights = adapter_weights(model, adapter)
        if weights.trained or weights.token_rows or weights.dora or weights.starts_at_rounding_error:
            full = weights.trained or weights.token_rows
            what = "holds fully trained weights" if full else "uses DoRA or LoftQ"
            raise AdapterError(f"adapter '{adapter}' {what}, which a sum of updates cannot express.")
        # b @ a summed over adapters: A's one below another (sum of R, in), B's side by side (out, sum of R), with share
        # and scaling in B. alpha = rank makes the joined scaling 1.
        for module, pair in weights.pairs.items():
            a, b = pair.a.float(), pair.b.float() * (share * weights.scaling(module))
            if module in joined.pairs:
                a, b = torch.cat([joined.pairs[module].a, a]), torch.cat([joined.pairs[module].b, b], dim=1)
            joined.pairs[module] = LoraPair(a, b, alpha=float(len(a)))
        joined.base, joined.base_fingerprint = weights.base, weights.base_fingerprint
    return put_weights(model, joined, name, trainable=False)
