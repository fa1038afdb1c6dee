"""The benchmarks of LOLA's paper (arXiv 2409.11272), with the harness's task names."""

from dataclasses import dataclass, replace
from functools import cache

from lola_ft.errors import UserError
from lola_ft.language_codes import short_code


@dataclass(frozen=True)
class Benchmark:
    """One benchmark in many languages.

    Attributes:
        category: The paper's kind of task.
        pattern: The harness's name of a task, with a place for the language.
        languages: Language codes as the harness writes them.
        metric: The metric that tables show.
    """

    name: str
    category: str
    pattern: str
    languages: tuple[str, ...]
    metric: str = "acc"

    @property
    def tasks(self) -> list[str]:
        """The harness's task names."""
        return [self.pattern.format(language) for language in self.languages]


_OKAPI = "ar bn ca da de es eu fr gu hi hr hu hy id it kn ml mr ne nl pt ro ru sk sr sv ta te uk vi"
_MGSM = "bn de en es fr ja ru sw te th zh"  # ten languages and English
_BELEBELE = """
acm_Arab afr_Latn als_Latn amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng azj_Latn bam_Latn
ben_Beng ben_Latn bod_Tibt bul_Cyrl cat_Latn ceb_Latn ces_Latn ckb_Arab dan_Latn deu_Latn ell_Grek eng_Latn est_Latn
eus_Latn fin_Latn fra_Latn fuv_Latn gaz_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hin_Latn hrv_Latn
hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kac_Latn kan_Knda kat_Geor kaz_Cyrl
kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang lao_Laoo lin_Latn lit_Latn lug_Latn luo_Latn lvs_Latn mal_Mlym
mar_Deva mkd_Cyrl mlt_Latn mri_Latn mya_Mymr nld_Latn nob_Latn npi_Deva npi_Latn nso_Latn nya_Latn ory_Orya pan_Guru
pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn ron_Latn rus_Cyrl shn_Mymr sin_Latn sin_Sinh slk_Latn slv_Latn sna_Latn
snd_Arab som_Latn sot_Latn spa_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn tam_Taml tel_Telu tgk_Cyrl tgl_Latn
tha_Thai tir_Ethi tsn_Latn tso_Latn tur_Latn ukr_Cyrl urd_Arab urd_Latn uzn_Latn vie_Latn war_Latn wol_Latn xho_Latn
yor_Latn zho_Hans zho_Hant zsm_Latn zul_Latn
"""
_QA, _REASONING, _NLI, _READING = "Q&A", "reasoning", "natural language inference", "reading comprehension"


def _benchmark(name: str, category: str, pattern: str, languages: str, metric: str = "acc") -> Benchmark:
    return Benchmark(name, category, pattern, tuple(languages.split()), metric)


LOLA_PAPER = {
    benchmark.name: benchmark
    for benchmark in (
        _benchmark("arc", _QA, "arc_{}", f"{_OKAPI} zh"),
        _benchmark("m_mmlu", _QA, "m_mmlu_{}", f"{_OKAPI} en is nb zh"),
        _benchmark("truthfulqa_mc1", _QA, "truthfulqa_{}_mc1", f"{_OKAPI} zh"),
        _benchmark("hellaswag", _REASONING, "hellaswag_{}", _OKAPI),
        _benchmark("mgsm_direct", _REASONING, "mgsm_direct_{}", _MGSM, "exact_match"),
        _benchmark("mgsm_native_cot", _REASONING, "mgsm_native_cot_{}", _MGSM, "exact_match"),
        _benchmark("xcopa", _REASONING, "xcopa_{}", "et ht id it qu sw ta th tr vi zh"),
        _benchmark("xstorycloze", _REASONING, "xstorycloze_{}", "ar en es eu hi id my ru sw te zh"),
        _benchmark("xwinograd", _REASONING, "xwinograd_{}", "en fr jp pt ru zh"),
        _benchmark("paws", _NLI, "paws_{}", "de en es fr ja ko zh"),
        _benchmark("xnli", _NLI, "xnli_{}", "ar bg de el en es fr hi ru sw th tr ur vi zh"),
        _benchmark("belebele", _READING, "belebele_{}", _BELEBELE),
        _benchmark("lambada", _READING, "lambada_openai_mt_stablelm_{}", "en fr es de it"),
    )
}
SUITES = {"lola-paper": LOLA_PAPER}

_ALSO_CALLED = (
    ("xwinograd_jp", "xwinograd_ja"),
    ("paws_", "pawsx_"),
    ("lambada_openai_mt_stablelm_", "lambada_openai_mt_"),
    ("mgsm_native_cot_", "mgsm_cot_native_"),
)
"""Beginnings of task names in one version of the harness, and in other versions."""


@dataclass(frozen=True)
class Chosen:
    """A task of the harness to run.

    Attributes:
        wanted: The suite's name of the task, which differs if the harness has renamed it.
        benchmark: The task's benchmark; None for a user's own task.
    """

    task: str
    wanted: str
    language: str
    benchmark: Benchmark | None = None


def choose(suite: str, tasks: list[str], languages: list[str]) -> list[Chosen]:
    """Return the selected tasks of a suite, under the suite's names.

    Args:
        tasks: Benchmarks or single tasks, which may be outside the suite; empty for the whole suite.
        languages: Codes, with two letters or as the harness writes them; empty for all.

    Raises:
        UserError: The suite is unknown, or no chosen task is in one of the languages.
    """
    if suite not in SUITES:
        raise UserError(f"--suite '{suite}' is unknown; choose one of {', '.join(SUITES)}.")
    benchmarks = SUITES[suite]
    every = [
        Chosen(task, task, code, benchmark)
        for benchmark in benchmarks.values()
        for task, code in zip(benchmark.tasks, benchmark.languages, strict=True)
    ]
    by_name = {one.task: one for one in every}
    chosen = []
    for name in tasks or benchmarks:
        if name in benchmarks:
            chosen += [one for one in every if one.benchmark and one.benchmark.name == name]
        else:
            chosen.append(by_name.get(name, Chosen(name, name, "")))
    kept = [one for one in chosen if not languages or not one.language or spoken(one.language) & set(languages)]
    found = {code for one in kept for code in spoken(one.language)}
    if any(one.language for one in chosen) and (absent := [code for code in languages if code not in found]):
        raise UserError(
            f"--languages: none of the chosen tasks of {suite} is in {', '.join(absent)}. They are in "
            f"{', '.join(sorted({one.language for one in chosen if one.language}))}."
        )
    return list(dict.fromkeys(kept))


def resolve(chosen: list[Chosen], known: set[str]) -> tuple[list[Chosen], list[str]]:
    """Return the tasks under the harness's names, which are among `known`, and the tasks that it lacks."""
    there, missing = list[Chosen](), list[str]()
    for one in chosen:
        others = (new + one.wanted.removeprefix(old) for old, new in _ALSO_CALLED if one.wanted.startswith(old))
        found = next((name for name in (one.wanted, *others) if name in known), None)
        if found:
            there.append(replace(one, task=found))
        else:
            missing.append(one.wanted)
    return there, missing


@cache
def spoken(code: str) -> frozenset[str]:
    """Return the codes that select a language of the harness: its own, without the script, and with two letters."""
    return frozenset((code, code.split("_")[0], "ja" if code == "jp" else short_code(code)))
