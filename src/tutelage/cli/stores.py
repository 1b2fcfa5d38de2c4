"""`tutelage targets show | convert`: looking into a store of teacher targets, and filling one.

`show` reads the shards with no torch; only the text of tokens needs the tokenizer.
"""

import bisect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tutelage.core.artifact import Artifact
from tutelage.core.errors import ArtifactError

if TYPE_CHECKING:
    from tutelage.targets.reader import TargetReader
    from tutelage.targets.schema import StoreMeta, TargetRow

Decode = Callable[[int], str]
LISTED_ROWS = 20
SHADES = ("red", "dark_orange", "yellow", "green")
"""By the teacher's probability of the token: under 1 %, under 10 %, under 50 %, and above."""
EDGES = (0.01, 0.1, 0.5)


def open_reader(artifact: Artifact, *, skip_damaged: bool) -> "TargetReader":
    """The store of a step. Raises ArtifactError when the step made none."""
    from tutelage.targets.reader import TargetReader

    paths = artifact.shards("part-*.parquet")
    if artifact.stage not in ("score", "convert") or not paths:
        raise ArtifactError(f"the step is of stage {artifact.stage}: it stored no targets")
    return TargetReader(paths, skip_damaged=skip_damaged)


def decoder(found: Mapping[str, Artifact], meta: "StoreMeta") -> Decode:
    """Ids to text by the tokenizer of any model of the run that is the store's; else ids."""
    from tutelage.text.tokenizer import load_tokenizer, tokenizer_digest

    for artifact in found.values():
        folder = artifact.path / "model"
        if folder.exists() and tokenizer_digest(folder) == meta.tokenizer:
            tokenizer = load_tokenizer(folder)
            return lambda token: str(tokenizer.decode([token]))
    return lambda token: f"<{token}>"


def summary(reader: "TargetReader") -> dict[str, Any]:
    """What the store is, and its first rows."""
    rows = []
    for index in range(min(len(reader), LISTED_ROWS)):
        row = reader.row(index)
        gain = row.targets.label_logp_N - row.student_logp_N
        rows.append(
            {
                "row": index, "id": row.id, "mode": row.mode, "tokens": len(row.response_ids),
                "finish": row.finish_reason,
                "logq_minus_logp": float(gain.mean()) if len(gain) else None,
            }
        )  # fmt: skip
    return {
        **vars(reader.meta), "rows": len(reader), "response_tokens": reader.num_tokens,
        "damaged": [damage.reason for damage in reader.damaged], "first_rows": rows,
    }  # fmt: skip


def tokens(row: "TargetRow", decode: Decode) -> list[dict[str, Any]]:
    """Each token of a response: what teacher and student gave it, and what is stored there."""
    targets = row.targets
    edges = [0, *targets.head_counts_N.cumsum().tolist()]
    found = []
    for n, token in enumerate(row.response_ids.tolist()):
        head = slice(edges[n], edges[n + 1])
        best = int(targets.head_ids_M[edges[n]]) if edges[n + 1] > edges[n] else None
        found.append(
            {
                "token": token, "text": decode(token),
                "teacher": math.exp(targets.label_logp_N[n]),
                "student": math.exp(row.student_logp_N[n]),
                "entropy": float(targets.entropy_N[n]),
                "head_ids": int(targets.head_counts_N[n]),
                "head_mass": min(1.0, sum(map(math.exp, targets.head_logq_M[head].tolist()))),
                "tail_ids": int(targets.tail_counts_N[n]),
                "teacher_best": None if best is None else decode(best),
            }
        )  # fmt: skip
    return found


def print_summary(console: Console, shown: Mapping[str, Any]) -> None:
    """The store in short, and how to look further."""
    for key, value in shown.items():
        if key not in ("first_rows", "damaged"):
            console.print(f"  {key} = {value}", highlight=False, markup=False, soft_wrap=True)
    for reason in shown["damaged"]:
        console.print(f"  left out: {reason}", style="red", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("row", "id", "mode", "tokens", "finish", "log q - log p"):
        table.add_column(name, justify="right" if name in ("row", "tokens") else "left")
    for row in shown["first_rows"]:
        gain = row["logq_minus_logp"]
        table.add_row(
            str(row["row"]), Text(row["id"]), row["mode"], str(row["tokens"]), row["finish"],
            "" if gain is None else f"{gain:+.3f}",
        )  # fmt: skip
    console.print(table)


def print_row(console: Console, row: "TargetRow", shown: list[dict[str, Any]], prompt: str) -> None:
    """The answer in colours, then a line a token."""
    console.print(f"{row.id} ({row.mode}, {row.finish_reason})", style="bold", markup=False)
    console.print(Text(prompt, style="dim"))
    answer = Text()
    for token in shown:
        answer.append(token["text"], style=f"black on {_shade(token['teacher'])}")
    console.print(answer, "")
    legend = Text("the teacher's probability of the token:")
    for shade, words in zip(SHADES, ("< 1 %", "< 10 %", "< 50 %", ">= 50 %"), strict=True):
        legend.append(" ")
        legend.append(f" {words} ", style=f"black on {shade}")
    console.print(legend, "")
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ("token", "teacher", "student", "entropy", "head", "head mass", "tail", "its best")
    for name in names:
        table.add_column(name, justify="left" if name in ("token", "its best") else "right")
    for token in shown:
        table.add_row(
            Text(repr(token["text"]), style=_shade(token["teacher"])), f"{token['teacher']:.4f}",
            f"{token['student']:.4f}", f"{token['entropy']:.3f}", str(token["head_ids"]),
            f"{token['head_mass']:.3f}", str(token["tail_ids"]),
            Text("" if token["teacher_best"] is None else repr(token["teacher_best"])),
        )  # fmt: skip
    console.print(table)


def converted_recipe(source: Path, model: str) -> dict[str, Any]:
    """A recipe of the one step that converts: so that a conversion is cached and resumed too."""
    folder = source.parent if any(sign in source.name for sign in "*?[") else source
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().stem).strip("-.") or "capture"
    return {
        "name": f"convert-{stem}",
        "models": {"model": {"source": model}},
        "steps": {"targets": {"stage": "convert", "source": str(source), "model": "model"}},
    }


def _shade(probability: float) -> str:
    return SHADES[bisect.bisect_right(EDGES, probability)]
