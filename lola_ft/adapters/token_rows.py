"""Trained rows of the embeddings, for special tokens that the base has not learned.

PEFT calls this `trainable_token_indices`, and adapters are stored in its form. PEFT's layer (0.21) copies the whole
embedding matrix in every forward pass and computes a gradient of that size. Here only the trained rows are computed, in
addition to the frozen matrix. If input embeddings and output head are tied, both use the same rows.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary, K trained rows.
"""

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lola_ft.errors import AdapterError
from lola_ft.kernels.loss import TokenRows


class TrainedRows(TrainableTokensLayer):
    """PEFT's layer on an embedding or an output head, computed row by row."""

    def rows(self) -> TokenRows | None:
        """Return the active adapter's rows; None without an active adapter."""
        names = [name for name in self.active_adapters if name in self.trainable_tokens_delta]
        if self.disable_adapters or self.merged or not names:
            return None
        (name,) = names
        rows_KD = self.trainable_tokens_delta[name]
        return TokenRows(torch.tensor(self.token_indices[name], device=rows_KD.device), rows_KD)

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        base, rows = self.get_base_layer(), self.rows()
        result = base(x, *args, **kwargs)
        if rows is None:
            return result
        rows_KD = rows.rows_KD.to(result.dtype)
        # Embedding: token ids (B, S) of which those with a trained row get it instead of the frozen one
        if isinstance(base, nn.Embedding):
            is_row_BSK = x[..., None] == rows.ids_K
            own_BSD = rows_KD[is_row_BSK.int().argmax(dim=-1)]
            return torch.where(is_row_BSK.any(dim=-1, keepdim=True), own_BSD, result)
        # Output head: logits (B, S, V) of which the K trained tokens' are replaced by x (B, S, D) @ rows.T (D, K)
        return result.index_copy(-1, rows.ids_K, x.to(rows_KD.dtype) @ rows_KD.t())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        raise AdapterError("PEFT cannot merge into a 4-bit base. Merge with merge.py (lola_ft.merge).")


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Grow a base's embeddings, and an output head that is not tied to them, to `rows` rows.

    New rows are the mean of the others. Does nothing if there are enough. The base keeps its fingerprint, because the
    new rows belong to the adapter that trains them.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if rows <= len(embeddings.weight):
        return
    tied = head.weight is embeddings.weight
    for module in (embeddings,) if tied else (embeddings, head):
        own_VD = module.weight
        mean_D = own_VD.float().mean(dim=0).to(own_VD.dtype)
        new_VD = torch.cat([own_VD, mean_D.expand(rows - len(own_VD), -1)])
        module.weight = nn.Parameter(new_VD, requires_grad=own_VD.requires_grad)
    if tied:
        head.weight = embeddings.weight
    embeddings.num_embeddings = head.out_features = model.config.vocab_size = rows
    if hasattr(model, "vocab_size"):
        model.vocab_size = rows


@torch.no_grad()
def start_at_mean(model: nn.Module, token_ids: Collection[int], adapter_name: str = "default") -> None:
    """Set the rows of tokens that the base has never seen to the mean of all rows, as the start of training."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            layer = module.token_adapter
            mean_D = layer.get_base_layer().weight.float().mean(dim=0)
            for place, token in enumerate(layer.token_indices[adapter_name]):
                if token in token_ids:
                    layer.trainable_tokens_delta[adapter_name][place] = mean_D


def compute_by_row(model: nn.Module) -> None:
    """Replace a model's layers of trained rows by `TrainedRows`."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.__class__ = TrainedRows
            module.bias = getattr(module.token_adapter.get_base_layer(), "bias", None)  # TRL reads it here
