"""Architecture settings of LOLA, a multilingual language model with sparse experts (arXiv 2409.11272)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Three names of the same function, the tanh approximation of GELU.
TANH_GELU_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


class LolaConfig(PretrainedConfig):
    """Settings of a LOLA checkpoint, under the names of its `config.json`; the defaults are `dice-research/lola_v1`.

    Args:
        vocab_size: Rows of the embeddings.
        n_positions: Longest sequence in tokens; each position has an embedding.
        n_embd: Width of the residual stream.
        n_layer: Layers. Every second one, from the second on, has experts in place of its MLP.
        n_head: Attention heads.
        n_inner: Width inside an MLP and inside an expert; by default `4 * n_embd`.
        num_experts: Experts per layer with experts.
        topk: Experts per token; always 1.
        activation_function: A name of the tanh approximation of GELU.
        resid_pdrop, embd_pdrop, attn_pdrop: Dropout of the layers' outputs, of embeddings, of attention weights.
        router_aux_loss_coef: Factor of `aux_loss` when a trainer adds it to the loss.
        scale_attn_weights: True to divide attention scores by the square root of a head's width.
        scale_attn_by_inverse_layer_idx: True to divide them also by the layer's number, counted from 1.

    Raises:
        ValueError: For a setting that this code does not support.
    """

    model_type = "lola_v1"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits"]
    attribute_map = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "num_experts_per_tok": "topk",
    }

    def __init__(
        self,
        vocab_size: int = 100_096,
        n_positions: int = 2048,
        n_embd: int = 2048,
        n_layer: int = 24,
        n_head: int = 16,
        n_inner: int | None = None,
        num_experts: int = 16,
        topk: int = 1,
        activation_function: str = "gelu_new",
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        router_aux_loss_coef: float = 0.01,
        output_router_logits: bool = False,
        scale_attn_weights: bool = True,
        scale_attn_by_inverse_layer_idx: bool = False,
        reorder_and_upcast_attn: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 5,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = 4 * n_embd if n_inner is None else n_inner
        self.num_experts = num_experts
        self.topk = topk
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        self.scale_attn_weights = scale_attn_weights
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.reorder_and_upcast_attn = reorder_and_upcast_attn
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self._refuse_what_the_code_lacks()

    def _refuse_what_the_code_lacks(self) -> None:
        problems = []
        if self.topk != 1:
            problems.append(f"topk is {self.topk!r}, but LOLA sends each token to exactly 1 expert")
        if self.activation_function not in TANH_GELU_NAMES:
            known = ", ".join(TANH_GELU_NAMES)
            problems.append(f"activation_function is {self.activation_function!r}, not one of {known}")
        if self.n_embd % self.n_head:
            problems.append(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.reorder_and_upcast_attn:
            problems.append("reorder_and_upcast_attn is set, which this code does not do")
        if not self.tie_word_embeddings:
            problems.append("tie_word_embeddings is false, but LOLA's output head is its input embeddings")
        if problems:
            raise ValueError("config.json: " + "; ".join(problems) + ".")
