"""TRL's fused head for models with some trained rows in the output head (special tokens).

TRL reads the head's weight. PEFT would compute it in every step: the whole matrix with the trained rows inserted, and
its gradient. Here the trained rows are scored separately from the frozen matrix.
"""

from typing import Any

from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from trl.trainer.utils import FusedCausalLMOutput

from lola_ft.families import architecture_of
from lola_ft.kernels.label_scores import label_scores
from lola_ft.kernels.loss import head_of


def score_trained_rows(model: PeftModel) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)` score trained rows separately, if the head has some.

    Call it after TRL has put its own fused head on the model. All other calls still go to TRL's head.
    """
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return
    of_trl, divisor = base.forward, architecture_of(base.config).sizes.logit_divisor

    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return of_trl(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        assert not kwargs.get("output_router_logits"), "preferences have no loss of the routers"
        x_BSD = getattr(base, base.base_model_prefix)(*args, **kwargs | {"use_cache": False}).last_hidden_state
        head_VD, trained = head_of(head)
        scores = label_scores(x_BSD if divisor == 1 else x_BSD / divisor, head_VD, labels, trained)
        return FusedCausalLMOutput(
            loss=-scores.log_probs_BS.sum() / scores.mask_BS.sum().clamp(min=1),
            log_probs=scores.log_probs_BS,
            entropy=scores.entropy_BS,
            mean_logits=scores.mean_logits_BS,
            is_top1=scores.is_top1_BS,
            label_mask=scores.mask_BS,
        )

    base.forward = forward
