"""LOLA's architecture settings, named as in the checkpoint's `config.json` (GPT-2's names, plus experts)."""

from typing import Any

from transformers import PreTrainedConfig

from lola_ft.errors import CheckpointError

# All three names mean the tanh approximation of GELU: the two that LOLA checkpoints use, and transformers' newer one.
TANH_GELU_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_inner", "n_layer", "n_head", "num_experts")


class LolaConfig(PreTrainedConfig):
    """Architecture of a LOLA checkpoint; defaults are `dice-research/lola_v1` (arXiv 2409.11272).

    Raises:
        CheckpointError: For a setting that this implementation does not support.
    """

    model_type = "lola_v1"
    keys_to_ignore_at_inference = ("past_key_values", "router_logits")
    attribute_map = {  # noqa: RUF012 (transformers reads it from the class)
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
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
        kwargs.pop("auto_map", None)  # names code beside the checkpoint, which is not copied where this config is saved
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner: int = 4 * n_embd if n_inner is None and _is_size(n_embd) else n_inner  # type: ignore[assignment]
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
        _refuse_unsupported(self)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Return True if the layer has experts instead of a dense MLP: every second layer, from the second on."""
        return layer_idx % 2 == 1


def _refuse_unsupported(config: LolaConfig) -> None:
    sizes = {name: getattr(config, name) for name in _SIZES}
    problems = [f"{name} is {size!r}, not a positive integer" for name, size in sizes.items() if not _is_size(size)]
    if config.topk != 1:
        problems.append(f"topk is {config.topk!r}, but LOLA sends each token to exactly 1 expert")
    if config.activation_function not in TANH_GELU_NAMES:
        known = ", ".join(TANH_GELU_NAMES)
        problems.append(f"activation_function is '{config.activation_function}', not one of {known}")
    if not problems and config.n_embd % config.n_head:
        problems.append(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    if config.reorder_and_upcast_attn:
        problems.append("reorder_and_upcast_attn is not supported; attention runs through transformers' interface")
    if not config.tie_word_embeddings:
        problems.append("tie_word_embeddings is false, but LOLA's output embeddings are its input embeddings")
    if problems:
        raise CheckpointError("config.json: " + "; ".join(problems) + ".")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
