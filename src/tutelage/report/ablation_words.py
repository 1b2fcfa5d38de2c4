"""How an ablation is put into words: verdicts, warnings, fairness, numbers with their intervals.

Takes the record that `ablation.json` holds. What is not seen is said as plainly as what holds.
"""

from collections.abc import Mapping
from typing import Any

from tutelage.report import figures

Record = Mapping[str, Any]

VERDICTS = {
    "holds": ("✓", "good", "green"),
    "reversed": ("✗", "bad", "red"),
    "not seen": ("?", "doubt", "yellow"),
    "higher": ("▲", "told", "cyan"),
    "lower": ("▼", "told", "cyan"),
    "no difference seen": ("=", "doubt", "yellow"),
}
"""Verdict -> its sign, its class on the page, its style on a terminal."""
UNITS = {"accuracy": "points", "tokens": "tokens an answer"}
"""Measure of a claim -> the unit of its difference."""
CUT_SHARE = 0.2
"""More answers cut off than this, and a score is one of length (`max_truncated_share`)."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def headline(record: Record) -> str:
    """How the claims fared, in a sentence."""
    seeds = len(record["cells"])
    where = f"{_times(seeds, 'seed')}, {_times(len(record['arms']), 'arm')}"
    counts = tally(record)
    if not counts:
        return f"{where}; no claim was written down before the run."
    told = ", ".join(
        f"{count} {'hold' if verdict == 'holds' and count > 1 else verdict}"
        for verdict, count in counts.items()
    )
    return f"{where}; of {_times(len(record['claims']), 'claim')}: {told}."


def lines(record: Record) -> list[tuple[str, str]]:
    """The verdicts for a terminal, one line each, with a style."""
    told = [(f"  {headline(record)}", "bold")]
    width = max((len(claim["verdict"]) for claim in record["claims"]), default=0)
    for claim in record["claims"]:
        sign, _, style = VERDICTS[claim["verdict"]]
        told.append(
            (f"  {sign} {claim['verdict']:<{width}}  {claim['text']}: {numbers_of(record, claim)}",
             style)
        )  # fmt: skip
    return told + [(f"  {warning}", "yellow") for warning in warnings(record)]


def numbers_of(record: Record, claim: Record) -> str:
    """A claim's difference, its seeds and its p-value, in words."""
    told = [_difference(claim)]
    if len(record["cells"]) > 1:
        told.append(f"{claim['seeds_with_sign']} of {len(record['cells'])} seeds")
    p_value = claim["p"] if claim["p_holm"] is None else claim["p_holm"]
    told.append(f"{'' if claim['p_holm'] is None else 'Holm '}{figures.p_value(p_value)}")
    if claim["share"]:
        told.append(share_text(record, claim))
    return "; ".join(told)


def share_text(record: Record, claim: Record) -> str:
    """What share of another arm's gain the better arm wins; empty where it was not asked."""
    if claim["share"]:
        return f"{of_gain(claim['share'])} of the gain of {label(record, claim['share_of'])}"
    if claim["share_undefined"]:
        most, than = label(record, claim["share_of"]), label(record, claim["than"])
        return f"share of a gain: not defined, since {most} may not gain on {than} at all"
    return ""


def tally(record: Record) -> dict[str, int]:
    """Verdict -> how many claims got it, in the order of VERDICTS."""
    verdicts = [claim["verdict"] for claim in record["claims"]]
    return {name: verdicts.count(name) for name in VERDICTS if name in verdicts}


def warnings(record: Record) -> list[str]:
    """What the design of the run cannot show, and scores that are not what they seem."""
    found = []
    seeds = len(record["cells"])
    if seeds == 1:
        found.append(
            "There is one seed only: intervals and p-values are over test items and say nothing of "
            "how another training would turn out. Seeds are missing."
        )
    elif _too_few(record):
        found.append(
            f"With {seeds} seeds no p can be under {record['least_p']:.3g}, which corrected over "
            f"{_times(record['tests'], 'claim')} is not under 0.05: no claim that one arm is "
            "better can hold here, however large the difference. Take "
            f"{record['seeds_needed']} seeds or more."
        )
    cut: dict[str, list[str]] = {}
    for entry in record["conditions"]:
        for name, arm in entry["arms"].items():
            if arm["truncated_share"]["estimate"] > CUT_SHARE:
                cut.setdefault(label(record, name), []).append(place(entry))
    if cut:
        where = "; ".join(f"{name} ({'; '.join(places)})" for name, places in cut.items())
        found.append(
            f"More than {figures.share(CUT_SHARE)} of the answers were cut off, so the score is "
            f"one of length: {where}."
        )
    return found


def _too_few(record: Record) -> bool:
    hopes = any(claim["expect"] == "better" for claim in record["claims"])
    return hopes and record["least_p"] * record["tests"] >= 1 - record["level"]


def plainly(record: Record, claim: Record) -> dict[str, str]:
    """Why a claim was not seen, or that the contrary was, in a sentence."""
    shown = f"{label(record, claim['better'])} minus {label(record, claim['than'])} is "
    shown += _difference(claim)
    low, high = claim["difference"]["low"], claim["difference"]["high"]
    outside = low > 0 or high < 0
    if claim["verdict"] == "reversed":
        why = "the interval lies on the other side: the run contradicts the claim"
        if claim["expect"] == "equal":
            why = "the interval lies wholly outside the margin: they are not equal"
    elif claim["expect"] == "equal":
        why = "the interval reaches beyond the margin: neither equality nor a difference is shown"
    elif outside:
        why = (
            "the interval leaves 0 out, but after Holm's correction "
            f"{figures.p_value(claim['p_holm'])}, which is not under 0.05"
        )
    else:
        least, most = (signed_number(bound, claim["measure"]) for bound in (low, high))
        why = (
            f"the interval holds 0, so anything from {least} to {most} is compatible with what was "
            "measured; that is no proof of equality"
        )
    return {"text": claim["text"], "verdict": claim["verdict"], "why": f"{shown}; {why}."}


def expected(claim: Record) -> str:
    if claim["expect"] == "equal":
        margin = claim["margin"] * (100 if claim["measure"] == "accuracy" else 1)
        return f"expected: equal within {margin:g} {UNITS[claim['measure']]}"
    if claim["expect"] == "open":
        return "nothing was expected"
    return "expected: " + ("higher" if claim["measure"] == "accuracy" else "fewer tokens")


def fairness(record: Record) -> list[str]:
    """What was matched and what was not, a sentence each."""
    told = []
    for group in record["groups"]:
        trained = [name for name in group["trained"] if name not in group["unmatched"]]
        if len(group["trained"]) < 2:
            continue
        if len(trained) > 1:
            who = "all" if not group["unmatched"] else f"{len(trained)} of {len(group['trained'])}"
            told.append(
                f"Matched: {who} arms of “{group['name']}” that train took the same number of "
                "optimizer steps on the same number of sequences, in every cell."
            )
        for name, why in group["unmatched"].items():
            told.append(
                f"Not matched: {label(record, name)}, of “{group['name']}”: {why}. A difference "
                "to its group may be one of budget."
            )
    loners = [arm["label"] for arm in record["arms"].values() if not arm["group"]]
    if loners:
        told.append(f"Matched with nothing, since they are in no group: {', '.join(loners)}.")
    return told + _controls(record)


def _controls(record: Record) -> list[str]:
    told = []
    for name, arm in record["arms"].items():
        if arm["own_lineage"]:
            itself = ", ".join(label(record, teacher) for teacher in arm["teachers"])
            told.append(
                f"Negative control: {label(record, name)} was taught by its own ancestor "
                f"({itself}). Such a teacher knows nothing new, so what this arm wins is what more "
                "training alone gives, and no merit of distillation."
            )
    if not told:
        told.append(
            "There is no negative control among the arms (a teacher of the student's own lineage, "
            "from which nothing should be won)."
        )
    for group in record["groups"]:
        taught: dict[str, list[str]] = {}
        for name in group["arms"]:
            arm = record["arms"][name]
            if arm["teachers"] and not arm["own_lineage"]:
                teachers = " and ".join(label(record, teacher) for teacher in arm["teachers"])
                taught.setdefault(teachers, []).append(arm["label"])
        if len(taught) > 1:
            usual = max(taught, key=lambda teachers: len(taught[teachers]))
            others = "; ".join(
                f"{', '.join(arms)} by {teachers}"
                for teachers, arms in taught.items()
                if teachers != usual
            )
            told.append(
                f"Teachers differ within “{group['name']}”: most arms were taught by {usual}, but "
                f"{others}. Where the teacher that wrote the answers is not the one that scores "
                "them, or another than the start learnt from, a loss may come from two styles at "
                "odds (teacher consistency), not from the method."
            )
    return told


def given(record: Record) -> str:
    """What making the teachers took, which no arm pays for; empty where nothing was made here."""
    spent = [
        cell["given_flops"] for arm in record["arms"].values() for cell in arm["costs"].values()
    ]
    return f"up to {flops(max(spent))} a cell" if any(spent) else ""


def computed(record: Record) -> list[str]:
    """How the numbers were made."""
    seeds = len(record["cells"])
    percent = f"{100 * record['level']:g} %"
    if seeds == 1:
        first = (
            f"Intervals are {percent} bootstrap intervals over test items "
            f"({record['bootstrap']:,} resamples); p-values are McNemar's exact test, or the "
            "paired bootstrap's where an item has several answers."
        )
    else:
        first = (
            f"Intervals are {percent} hierarchical bootstrap intervals ({record['bootstrap']:,} "
            "resamples): seeds are drawn first, then the test items, which all seeds share where "
            "they ask the same. From 5 seeds on their width is corrected by the variance that a "
            "two-way table of seeds and items gives, since two draws count the rest more than "
            "once. A difference is paired by seed and item."
        )
    second = (
        "p-values are of the two-sided sign-flip (randomisation) test over the seeds' mean "
        f"differences; with {seeds} seeds none can be under {record['least_p'] or 1:.2g}. "
        if seeds > 1
        else ""
    )
    second += (
        f"Holm's correction runs over the {_times(record['tests'], 'claim')} that expected "
        "something. A claim of “better” holds when its interval lies beyond 0 on the claimed side "
        "and the corrected p is under 0.05; it is reversed when the interval lies beyond 0 on the "
        "other side. “Equal” holds when the interval lies within the margin, and is reversed when "
        "it lies wholly outside. Anything else is not seen."
    )
    third = (
        "Where all answers are right or all wrong there is nothing to resample: the interval is "
        "Wilson's over the items. Tokens per correct answer are all tokens over all correct "
        "answers (a ratio of means, resampled together), and left out where too few are correct."
    )
    fourth = (
        "FLOPs are an estimate: 6 P a trained token and 2 P a decoded or prefilled one, P being "
        "the parameters of the model that did it, embeddings included. Prompts read before "
        "decoding and attention are not in it."
    )
    return [first, second, third, fourth]


def label(record: Record, name: str) -> str:
    return record["arms"][name]["label"] if name in record["arms"] else name


def place(entry: Record) -> str:
    temperature = entry["temperature"]
    how = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    return f"{entry['test']}, {entry['mode']} mode, {how}"


def _difference(claim: Record) -> str:
    measure = claim["measure"]
    shown = signed_number(claim["difference"]["estimate"], measure)
    return f"{shown} {bounds(claim['difference'], measure, signed=True)} {UNITS[measure]}"


def bounds(entry: Record, measure: str, *, signed: bool = False) -> str:
    write = signed_number if signed else plain
    return f"[{write(entry['low'], measure)}, {write(entry['high'], measure)}]"


def plain(value: float, measure: str) -> str:
    """One decimal: of percent for accuracies and shares, of tokens otherwise."""
    return figures.tenths(100 * value if measure == "accuracy" else value)


def signed_number(value: float, measure: str) -> str:
    text = plain(value, measure)
    if text.strip("−0.") == "":
        return "0.0"
    return text if text.startswith("−") else f"+{text}"


def of_gain(share: Record) -> str:
    low, high = (f"{100 * share[key]:.0f}".replace("-", "−") for key in ("low", "high"))
    return f"{100 * share['estimate']:.0f} % [{low}, {high}]".replace("-", "−")


def flops(value: float) -> str:
    """Three digits with a prefix; none at all as a dash."""
    if not value:
        return figures.MISSING
    step = 0
    while value >= 999.5 and step < len(PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {PREFIXES[step]}FLOP"


def _times(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
