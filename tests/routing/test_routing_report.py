"""Reports: numbers that follow from the counts, drift, descent found where it is and not where it is not, the files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_ft.errors import UserError
from lola_ft.evaluation.suite.benchmarks import LOLA_PAPER
from lola_ft.routing.descent import follow_descent, routing_distances, token_distances
from lola_ft.routing.drift import compare
from lola_ft.routing.figures import principal_components
from lola_ft.routing.language_families import find_language, read_languages
from lola_ft.routing.measures import flip_rate, jensen_shannon
from lola_ft.routing.profile import Profile, save_profile
from lola_ft.routing.profiling import profile_routing
from lola_ft.routing.report_page import write_report
from lola_ft.routing.summary import summarise

Make = Callable[..., Profile]
# Two families, three branches, four scripts.
EIGHT = ("de", "sv", "ru", "uk", "pl", "tr", "az", "kk")


def related(num_experts: int = 8, noise: int = 0) -> torch.Tensor:
    """Counts (8, 2, E) by which relatives of one branch share an expert and each family has a second one."""
    counts = torch.full((8, 2, num_experts), 10)
    for place, code in enumerate(EIGHT):
        language = find_language(code)
        assert language
        branches = ["Germanic", "Slavic", "Oghuz", "Kipchak"]
        counts[place, :, branches.index(language.branch)] += 200
        counts[place, :, 4 if language.family == "Turkic" else 5] += 200
    return counts + torch.randint(0, noise + 1, counts.shape, generator=torch.Generator().manual_seed(0))


def test_a_summary_of_known_counts_is_exact(made_profile: Make) -> None:
    profile = made_profile(["de", "sw"], [[[8, 0, 0, 0], [2, 2, 2, 2]], [[2, 2, 0, 0], [4, 0, 0, 0]]])
    found = summarise(profile)
    first, second = found["layers"]
    assert first["load"] == [0.75, 0.25, 0, 0]
    assert first["dead_experts"] == [2, 3]
    assert first["specificity"] == [1, 0.5, 0, 0]
    assert first["most_specific_to"][:2] == ["de", "sw"]
    assert second["dead_experts"] == []
    assert second["specificity"] == [1, 0.25, 0.25, 0.25]
    assert found["languages"]["de"]["load_entropy"] == [0, 1]
    assert found["languages"]["sw"]["largest_share"] == [0.5, 1]
    assert found["languages"]["sw"]["dead_experts"] == [2, 3]


def test_drift_is_divergence_and_flips_and_zero_against_itself(
    tiny_base: Path, tiny_adapter: Path, texts: Path, profile: Profile
) -> None:
    other = profile_routing(tiny_adapter, [texts], base=str(tiny_base), quantization=None, sample=40, device="cpu")
    drift = compare(profile, other)
    assert drift.divergence_LM.equal(jensen_shannon(profile.counts_LME, other.counts_LME))
    for language, flips in drift.flips.items():
        assert flips is not None
        expected = flip_rate(profile.choices(language)[..., None], other.choices(language)[..., None])
        assert flips.equal(expected)
    assert max(flips.max() for flips in drift.flips.values() if flips is not None) > 0
    same = compare(profile, profile)
    assert same.divergence_LM.max() < 1e-12
    assert all(flips is not None and not flips.any() for flips in same.flips.values())


def test_flips_only_on_the_same_tokens(tiny_base: Path, texts: Path, profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "sw.txt").write_text("Maneno mengine kabisa.")
    (tmp_path / "en.txt").write_text((texts / "en.txt").read_text())
    (tmp_path / "fr.txt").write_text("un deux trois")
    other = profile_routing(tiny_base, [tmp_path], quantization=None, sample=40, device="cpu")
    drift = compare(profile, other)
    assert drift.languages == ("en", "sw")
    assert drift.left_out == ("de", "fr")
    assert drift.flips["sw"] is None
    assert drift.flips["en"] is not None
    fewer = profile_routing(tiny_base, [texts], quantization=None, sample=20, device="cpu")
    assert compare(profile, fewer).flips["en"] is None


def test_profiles_of_other_shapes_or_languages_are_not_compared(made_profile: Make) -> None:
    one = made_profile(["de"], [[[1, 1]]])
    with pytest.raises(UserError, match="made has 1 MoE layers of 2 experts, made 1 of 3"):
        compare(one, made_profile(["de"], [[[1, 1, 1]]]))
    with pytest.raises(UserError, match="no language is in both"):
        compare(one, made_profile(["sw"], [[[1, 1]]]))


def test_descent_is_found_where_it_is(made_profile: Make) -> None:
    found = follow_descent(made_profile(EIGHT, related(noise=20)), permutations=199)
    assert found
    assert (found["languages"], found["families"], found["scripts"]) == (8, 2, 2)
    overall = found["layers"]["all"]
    assert overall["mantel"]["family"]["r"] > 0.8
    assert overall["mantel"]["family"]["p"] < 0.02
    assert overall["mantel"]["family given script"]["r"] > 0.7
    assert overall["mantel"]["tokens"] == {"r": None, "p": None}  # made: no two languages share a token
    assert overall["neighbours"]["family"]["share"] == 1.0
    assert set(found["layers"]) == {"all", "1", "3"}


def test_descent_is_not_found_where_it_is_not(made_profile: Make) -> None:
    """The same routing, given to the wrong languages."""
    shuffled = related(noise=20)[torch.tensor([0, 5, 2, 7, 1, 3, 6, 4])]
    found = follow_descent(made_profile(EIGHT, shuffled), permutations=199)
    assert found
    assert found["layers"]["all"]["mantel"]["family"]["p"] > 0.05


def test_routing_by_script_does_not_count_as_descent(made_profile: Make) -> None:
    counts = torch.randint(5, 15, (8, 1, 4), generator=torch.Generator().manual_seed(0))
    for place, code in enumerate(EIGHT):
        language = find_language(code)
        assert language
        counts[place, 0, ["Latin", "Cyrillic"].index(language.script)] += 100
    found = follow_descent(made_profile(EIGHT, counts), permutations=199)
    assert found
    tests = found["layers"]["all"]["mantel"]
    assert tests["script"]["p"] < 0.05
    assert tests["family given script"]["p"] > 0.05


def test_too_few_languages_are_not_tested(made_profile: Make) -> None:
    assert follow_descent(made_profile(EIGHT[:7], related()[:7])) is None
    assert follow_descent(made_profile([*EIGHT[:7], "eo"], related())) is None  # constructed: no family


def test_distances_are_symmetric_and_zero_to_oneself(profile: Profile) -> None:
    distances_MLL = routing_distances(profile)
    assert distances_MLL.shape == (2, 3, 3)
    assert distances_MLL[1, 0, 2] == jensen_shannon(profile.counts_LME[0, 1], profile.counts_LME[2, 1]).sqrt()
    tokens = token_distances(profile)
    assert tokens.diagonal().abs().max() < 1e-12
    assert 0 < tokens[0, 1] < 1
    assert tokens.equal(tokens.T)


def test_points_on_a_line_have_one_principal_component() -> None:
    """Points on a line: one direction has all the variance, and their order is kept."""
    line = torch.tensor([0.0, 1.0, 3.0])[:, None] * torch.tensor([[1.0, 2.0, 2.0]])
    places, parts = principal_components(line.double().numpy())
    assert parts[0] == pytest.approx(1)
    assert (places[1:, 0] - places[0, 0]).tolist() == pytest.approx([3, 9])


def test_every_language_of_the_table_has_name_script_and_one_family() -> None:
    languages = read_languages().values()
    assert len(languages) > 200
    for language in languages:
        assert language.name
        assert language.script
        assert bool(language.family) == bool(language.branch)
    assert find_language("zh_Hans") == find_language("zh")
    assert not any(find_language(code) is None for code in LOLA_PAPER["belebele"].languages)
    assert find_language("swh_Latn") == find_language("sw")
    serbian, latin = find_language("sr"), find_language("sr_Latn")
    assert serbian
    assert latin
    assert (serbian.script, latin.script, latin.branch) == ("Cyrillic", "Latin", "Slavic")
    assert find_language("pt-BR") == find_language("pt")
    assert find_language("xx") is None
    branch_families: dict[str, set[str]] = {}
    for language in languages:
        branch_families.setdefault(language.branch, set()).add(language.family)
    assert all(len(families) == 1 for families in branch_families.values())


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("languages", [1, 3, 150])
def test_a_report_of_few_or_many_languages_is_whole(languages: int, made_profile: Make, tmp_path: Path) -> None:
    codes = list(read_languages())[:languages]
    torch.manual_seed(0)
    profile = made_profile(codes, torch.randint(1, 99, (languages, 1, 16)))
    page = write_report(profile, tmp_path / "report", permutations=9).page
    text, folder = page.read_text(encoding="utf-8"), page.parent
    pictures = {"specificity", "layer-01"} | ({"tree", "map"} if languages > 2 else set())
    assert {file.stem for file in folder.glob("*.png")} == pictures
    sources = re.findall(r'src="([^"]{22})', text)
    assert len(sources) == len(pictures)
    assert set(sources) == {"data:image/png;base64,"}
    assert not re.search(r"https?://", text)
    assert all(f"{code} {read_languages()[code].name.replace(chr(39), '&#39;')}" in text for code in codes)
    numbers = json.loads((folder / "report.json").read_text())
    assert len(numbers["first"]["languages"]) == languages
    assert (numbers["first"]["descent"] is None) == (languages < 8)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_the_report_of_two_profiles_says_what_changed(
    profile: Profile, tiny_base: Path, tiny_adapter: Path, texts: Path, tmp_path: Path, verb: Callable[..., Any]
) -> None:
    other = profile_routing(tiny_adapter, [texts], base=str(tiny_base), quantization=None, sample=40, device="cpu")
    files = [str(save_profile(one, tmp_path / f"{name}.safetensors")) for name, one in (("a", profile), ("b", other))]
    done = verb("routing", "report", *files)
    assert done.code == 0, done.err
    rates = [flips.mean().item() for flips in compare(profile, other).flips.values() if flips is not None]
    assert f"{sum(rates) / 3:.1%} of sampled tokens changed expert (3 of 3 languages)" in done.out
    folder = tmp_path / "a-report"
    numbers = json.loads((folder / "report.json").read_text())
    assert set(numbers["drift"]["languages"]) == {"de", "en", "sw"}
    assert numbers["second"]["profile"]["kind"] == "adapter"
    assert {"drift", "flips"} <= {file.stem for file in folder.glob("*.png")}
    assert "not the same tokens" not in (folder / "report.html").read_text()
    assert "the changes include rounding" not in done.out + (folder / "report.html").read_text()
    first = (folder / "report.html").read_bytes()
    assert verb("routing", "report", *files).code == 0  # an earlier report is replaced
    assert (folder / "report.html").read_bytes() == first
    done = verb("routing", "report", *files, "--out", str(tmp_path))
    assert done.code == 2
    assert "exists and holds no report" in done.err
    done = verb("routing", "report", *files, "--out", f"{files[0]}/report")
    assert done.code == 2
    assert "a.safetensors is not a folder" in done.err


def test_a_drift_that_is_also_rounding_is_told(made_profile: Make, tmp_path: Path) -> None:
    """A dense base against a run on 4-bit weights."""
    counts = [[[3, 1]], [[1, 3]]]
    first, second = (made_profile(["de", "sw"], counts, quantization=form) for form in ("none", "nf4"))
    report = write_report(first, tmp_path / "report", second, permutations=9)
    assert "the changes include rounding" in report.headlines()[-1]
    page = report.page.read_text()
    assert "the changes include rounding" in page
    assert page.count(", in 4 bit)") == 1


def test_every_public_name_of_the_package_is_callable() -> None:
    import lola_ft.routing as routing

    assert all(callable(getattr(routing, name)) for name in routing.__all__)
