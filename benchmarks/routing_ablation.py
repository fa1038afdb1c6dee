"""Measure the value of learned routing: `python benchmarks/routing_ablation.py --help`.

Trains small LOLAs on the Universal Declaration of Human Rights that differ only in the choice of a token's expert:

    learned        LOLA's router: top-1 by softmax, with its balancing loss
    by token       drawn once for each token of the vocabulary and each layer, then fixed
    by language    the same for all tokens of a language; languages of one family share an expert as far as possible
    dense, active  no experts: one feed-forward network of an expert's width, with equal active parameters per token
    dense, total   no experts: one feed-forward network as wide as all experts together, with equal total parameters

All train on the same text in the same order, with the same number of tokens and the same seed. The amount of a
language's text depends on its group: all articles (high), a third of them (middle) or two (low). The groups rotate with
the seed, but the language of fine-tuning is always in the low group. Bits per byte are measured on the held-out
articles 26 to 30, before and after fine-tuning of all weights on one language. Prints a JSON line for each run, then a
table of means and differences with 95 % intervals over the seeds (Student's t), then one JSON line.
"""

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lola_ft.console import Console, shown_progress
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.model.experts import FusedExperts
from lola_ft.model.layers import LolaMLP
from lola_ft.nano.build import train_tokenizer
from lola_ft.nano.declaration import HELD_OUT_ARTICLES, NUM_ARTICLES, find_declaration
from lola_ft.nano.pretrain import restarting_positions
from lola_ft.routing.language_families import find_language

LEARNED, BY_TOKEN, BY_LANGUAGE, DENSE_ACTIVE, DENSE_TOTAL = KINDS = (
    "learned", "by token", "by language", "dense, active", "dense, total",
)  # fmt: skip
GROUPS = {"high": 25, "middle": 8, "low": 2}
"""Number of first articles that are trained on, by group."""
LANGUAGES = "en de nl sv fr es pt it ru uk bg pl hi mr sw zu xh rw id ms jv fi et tr"
ROW = 256
"""Tokens of a packed row."""


@dataclass(frozen=True)
class Document:
    """An article as token ids, with its language's place in the list and the bytes of all tokens but the first."""

    language: int
    ids: list[int]
    predicted_bytes: int


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    runs = []
    for seed in range(args.seeds):
        languages, groups = grouped(args.languages.split(), args.target, seed)
        texts = [article for code in languages for article in training_articles(code, GROUPS[groups[code]])]
        tokenizer = train_tokenizer(texts, args.vocab, ROW)
        for kind in args.kinds.split(";"):
            began = time.process_time()
            run = {"kind": kind, "seed": seed} | one_run(kind, seed, languages, groups, tokenizer, args)
            runs.append(run | {"cpu_s": round(time.process_time() - began, 1)})
            print(json.dumps(runs[-1]), flush=True)
    Console(width=200).print(table(runs, args.target))
    print(json.dumps({"result": summary(runs), "runs": runs, "shape": vars(args)}))


def grouped(languages: list[str], target: str, seed: int) -> tuple[list[str], dict[str, str]]:
    """Return the languages, sorted by family, and each language's group. Relatives are in different groups."""

    def descent(code: str) -> tuple[str, str]:
        found = find_language(code)
        return (found.family, found.branch) if found else ("", code)

    ordered, names = sorted(languages, key=descent), list(GROUPS)
    groups = {code: names[(place + seed) % len(names)] for place, code in enumerate(ordered)}
    return ordered, groups | {target: "low"}


def training_articles(code: str, count: int) -> list[str]:
    """Return the texts of a language's first articles, without held-out ones."""
    kept = [number for number in range(1, NUM_ARTICLES + 1) if number not in HELD_OUT_ARTICLES][:count]
    return [find_declaration(code).articles[number - 1].text for number in kept]


def encoded(texts: Sequence[str], language: int, tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """Tokenise texts. Each is cut to one row, so that all kinds train on the same tokens."""
    documents = []
    for text, ids in zip(
        texts, tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"], strict=True
    ):
        kept = ids[:ROW]
        sizes = [len(piece) for piece in tokenizer.convert_ids_to_tokens(kept)]  # byte-level: a character per byte
        assert len(kept) < len(ids) or sum(sizes) == len(text.encode()), "the tokens are the text's bytes"
        documents.append(Document(language, kept, sum(sizes[1:])))
    return documents


def one_run(
    kind: str,
    seed: int,
    languages: list[str],
    groups: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Pre-train, measure, fine-tune on one language, and measure again."""
    train, test = list[Document](), list[Document]()
    for place, code in enumerate(languages):
        train += encoded(training_articles(code, GROUPS[groups[code]]), place, tokenizer)
        held_out = [find_declaration(code).articles[number - 1].text for number in HELD_OUT_ARTICLES]
        test += encoded(held_out, place, tokenizer)
    model = Variant(kind, seed, len(languages), args)
    learn(model, train, tokenizer.eos_token_id, args.steps, args.rate, seed)
    before = bits_per_byte(model, test, len(languages))
    target = languages.index(args.target)
    own = encoded(training_articles(args.target, GROUPS["high"]), target, tokenizer)
    learn(model, own, tokenizer.eos_token_id, args.tuning_steps, args.tuning_rate, seed)
    after = bits_per_byte(model, test, len(languages))
    others = [place for place in range(len(languages)) if place != target]
    by_group = {
        group: fmean(before[place] for place in others if groups[languages[place]] == group) for group in GROUPS
    }
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active": model.active_parameters,
        **by_group,
        "target before": before[target],
        "target after": after[target],
        "others before": fmean(before[place] for place in others),
        "others after": fmean(after[place] for place in others),
    }


class Variant(nn.Module):
    """A small LOLA of one kind. It gets each token's language, which only one kind uses."""

    def __init__(self, kind: str, seed: int, num_languages: int, args: argparse.Namespace) -> None:
        super().__init__()
        config = LolaConfig(
            vocab_size=args.vocab, n_positions=ROW, n_embd=args.hidden, n_head=args.heads, n_inner=args.inner,
            n_layer=args.layers, num_experts=args.experts, initializer_range=0.05, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
        torch.manual_seed(seed)
        self.kind, self.lola = kind, LolaForCausalLM(config)
        nn.init.normal_(self.lola.transformer.wte.weight, std=0.25)  # like the nano base
        drawn = torch.Generator().manual_seed(seed)
        for block in self.lola.transformer.h:
            if not block.is_moe or kind == LEARNED:
                continue
            if kind in (DENSE_ACTIVE, DENSE_TOTAL):
                width = args.inner * (args.experts if kind == DENSE_TOTAL else 1)
                block.mlp, block.is_moe = dense(config, width), False
                del block.moe
            else:
                count = args.vocab if kind == BY_TOKEN else num_languages
                table = torch.randint(args.experts, (args.vocab,), generator=drawn)
                if kind == BY_LANGUAGE:
                    table = torch.arange(count) * args.experts // count  # relatives are neighbours
                block.moe = FixedMoe(block.moe.experts, table)

    @property
    def active_parameters(self) -> int:
        """Return the number of active parameters per token, with one expert per layer."""
        total = sum(parameter.numel() for parameter in self.parameters())
        experts = [module for module in self.modules() if isinstance(module, FusedExperts)]
        held = sum(parameter.numel() for module in experts for parameter in module.parameters())
        return total - held + sum(p.numel() // m.num_experts for m in experts for p in m.parameters())

    def forward(self, ids_BS: Tensor, languages_BS: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, S, V) and the balancing loss, which is 0 without a router."""
        keys_T = (languages_BS if self.kind == BY_LANGUAGE else ids_BS).flatten()
        for block in self.lola.transformer.h:
            if block.is_moe and isinstance(block.moe, FixedMoe):
                block.moe.keys_T = keys_T
        out = self.lola(ids_BS, position_ids=positions_BS, use_cache=False, output_router_logits=True)
        return out.logits, self.lola.config.router_aux_loss_coef * out.aux_loss


class FixedMoe(nn.Module):
    """Experts without a router. A table gives each token's expert, and outputs are not scaled."""

    def __init__(self, experts: FusedExperts, table: Tensor) -> None:
        super().__init__()
        self.experts, self.keys_T = experts, torch.empty(0, dtype=torch.int64)
        self.register_buffer("table", table)

    def forward(self, x_BSD: Tensor, _: list[Tensor] | None = None) -> tuple[Tensor, None]:
        """Return the output (B, S, D), and no scores."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        expert_ids_T1 = self.table[self.keys_T][:, None]
        return self.experts(x_TD, expert_ids_T1, x_TD.new_ones(len(x_TD), 1)).view_as(x_BSD), None


def dense(config: LolaConfig, width: int) -> LolaMLP:
    """Return LOLA's dense feed-forward network in another width, initialised like LOLA."""
    made = LolaMLP(LolaConfig(**config.to_dict() | {"n_inner": width}))
    for layer in (made.c_fc, made.c_proj):
        nn.init.normal_(layer.weight, std=config.initializer_range)
        nn.init.zeros_(layer.bias)
    return made


def learn(
    model: Variant, documents: Sequence[Document], eos: int, steps: int, rate: float, seed: int, rows: int = 4
) -> None:
    """Train all weights on packed rows for a number of steps, in an order that depends only on the seed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 30), steps)
    batches = packed_batches(documents, eos, rows, random.Random(seed))
    model.train()
    with shown_progress(f"Training ({model.kind})", steps, "steps") as advance:
        for _ in range(steps):
            ids_BS, languages_BS = next(batches)
            logits_BSV, balance = model(ids_BS, languages_BS, restarting_positions(ids_BS, eos))
            # The first token of a document has no context, so it is not learned.
            labels = ids_BS[:, 1:].masked_fill(ids_BS[:, :-1] == eos, -100)
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels.flatten())
            (loss + balance).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            advance(1)


def packed_batches(
    documents: Sequence[Document], eos: int, rows: int, order: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and languages (B, S) without end, and shuffle the documents for every epoch."""
    ids, languages = list[int](), list[int]()
    while True:
        while len(ids) < rows * ROW:
            for document in order.sample(documents, len(documents)):
                ids += [*document.ids, eos]
                languages += [document.language] * (len(document.ids) + 1)
        cut = rows * ROW
        yield torch.tensor(ids[:cut]).view(rows, ROW), torch.tensor(languages[:cut]).view(rows, ROW)
        ids, languages = ids[cut:], languages[cut:]


@torch.inference_mode()
def bits_per_byte(model: Variant, documents: Sequence[Document], num_languages: int, batch: int = 16) -> list[float]:
    """Return each language's bits per byte. A document's first token is only context, and its bytes do not count."""
    nats, sizes = np.zeros(num_languages), np.zeros(num_languages)
    model.eval()
    ordered = sorted(documents, key=lambda document: len(document.ids))
    for start in range(0, len(ordered), batch):
        chosen = ordered[start : start + batch]
        width = max(len(document.ids) for document in chosen)
        ids_BS = torch.tensor([document.ids + [0] * (width - len(document.ids)) for document in chosen])
        languages_BS = torch.tensor([[document.language] * width for document in chosen])
        positions_BS = torch.arange(width).expand_as(ids_BS)
        logits_BSV, _ = model(ids_BS, languages_BS, positions_BS)
        costs_BS = F.cross_entropy(logits_BSV[:, :-1].transpose(1, 2), ids_BS[:, 1:], reduction="none")
        for document, costs_S in zip(chosen, costs_BS, strict=True):
            nats[document.language] += costs_S[: len(document.ids) - 1].sum().item()
            sizes[document.language] += document.predicted_bytes
    return (nats / math.log(2) / sizes).tolist()


MEASURES = ("high", "middle", "low", "target before", "target after", "others before", "others after")


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each kind's means, and its differences to the learned router of the same seed with their half widths."""
    by_kind: defaultdict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        by_kind[run["kind"]][run["seed"]] = run
    found: dict[str, dict[str, Any]] = {}
    for kind, seeds in by_kind.items():
        first = next(iter(seeds.values()))
        found[kind] = {"parameters": first["parameters"], "active": first["active"]}
        for measure in MEASURES:
            both = [seed for seed in seeds if seed in by_kind[LEARNED]]
            differences = [seeds[seed][measure] - by_kind[LEARNED][seed][measure] for seed in both]
            found[kind][measure] = {
                "mean": fmean(run[measure] for run in seeds.values()),
                "difference": fmean(differences) if differences else None,
                "half_width": half_width(differences),
            }
    return found


def half_width(values: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of a mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def table(runs: Sequence[dict[str, Any]], target: str) -> Table:
    """Show means, and in brackets the difference to the learned router with its interval."""
    made = Table(title=f"Bits per byte of held-out articles; fine-tuned on {target}", title_justify="left")
    for heading in ("experts", "parameters", "active", *MEASURES):
        made.add_column(heading, justify="left" if heading == "experts" else "right")
    for kind, found in summary(runs).items():
        made.add_row(
            kind,
            f"{found['parameters']:,}",
            f"{found['active']:,}",
            *(cell(found[measure], kind == LEARNED) for measure in MEASURES),
        )
    return made


def cell(value: dict[str, Any], alone: bool) -> str:
    """Write `2.345 (+0.012 ± 0.030)`."""
    if alone or value["difference"] is None:
        return f"{value['mean']:.3f}"
    width = "" if value["half_width"] is None else f" ± {value['half_width']:.3f}"
    return f"{value['mean']:.3f} ({value['difference']:+.3f}{width})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", default=LANGUAGES, help="tags of the declaration, with spaces between")
    parser.add_argument("--target", default="sw", help="language of the fine-tuning (sw)")
    parser.add_argument("--kinds", default=";".join(KINDS), help="with semicolons between (all)")
    for name, value in {"seeds": 3, "steps": 300, "tuning-steps": 30, "vocab": 2048, "hidden": 64, "heads": 2,
                        "inner": 128, "layers": 4, "experts": 8, "threads": 1}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of pre-training (0.005)")
    parser.add_argument("--tuning-rate", type=float, default=1e-3, help="of fine-tuning (0.001)")
    args = parser.parse_args()
    unknown = [kind for kind in args.kinds.split(";") if kind not in KINDS]
    if unknown:
        parser.error(f"--kinds: there is no '{unknown[0]}', but {'; '.join(KINDS)}")
    if args.target not in args.languages.split():
        parser.error(f"--target {args.target} must be one of --languages")
    return args


if __name__ == "__main__":
    main()
