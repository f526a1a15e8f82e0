"""The report of `benchmarks.compare` as a Markdown table."""

import inspect
from collections.abc import Mapping
from typing import Any

from benchmarks.peers import PEERS
from maml.inner_loop import unroll


def table(report: Mapping[str, Any]) -> str:
    """Medians in milliseconds per outer step, then of the library: ratios, share of the machine's peak, compilation, memory."""
    rows = report["rows"]
    if not any("sides" in row for row in rows):
        return _markdown(
            ["case", "order", "inner steps", *_names(rows, "float64 differences")], map(_checked(rows), rows)
        )
    names = _names(rows, "sides")
    peak = max(report["sgemm_gflops"].values())
    header = ["case", "order", "inner steps", *(f"{n}, ms" for n in names), "fastest peer / library", "mixed / reverse",
              "share of peak", "compilation, s", "temporaries, MB"]  # fmt: skip
    found = _markdown(header, (_row(row, names, peak) for row in rows))
    m = report["machine"]
    return (
        f"{found}\n\n{m['processor']}, {m['threads']} threads, {peak:.0f} GFLOP/s (float32 matrix product); "
        f"jax {m['jax']}, torch {report['peers'].get('torch', '–')}. Ratios, share, compilation and memory are those of "
        f"{' and '.join(dict.fromkeys(library(row) for row in rows))}."
    )


def library(row: Mapping[str, Any]) -> str:
    """The side of a row that is the library as it comes: with the default derivative of `unroll` in second order."""
    derivative = inspect.signature(unroll).parameters["derivative"].default
    default = f"library {getattr(derivative, '__name__', '')}"
    names = [name for name in row["sides"] if name.startswith("library")]
    return default if default in names else names[0]


def _row(row: Mapping[str, Any], names: list[str], peak: float) -> list[str]:
    times = {name: side["median_ms"] for name, side in row["sides"].items()}
    ours = library(row)
    peers = [t for name, t in times.items() if name in PEERS]
    both = [times.get(f"library {name}") for name in ("mixed", "reverse")]
    return [
        row["case"], row["order"], str(row["steps"]),
        *(f"{times[n]:.3g}" if n in times else _reason(row, n) for n in names),
        f"{min(peers) / times[ours]:.2f}" if peers else "–",
        f"{both[0] / both[1]:.2f}" if all(both) else "–",
        f"{row['flops'] / times[ours] * 1e-6 / peak:.0%}",
        f"{row['sides'][ours]['compile_s']:.1f}",
        f"{row['sides'][ours]['temporary_bytes'] / 1e6:.1f}",
    ]  # fmt: skip


def _reason(row: Mapping[str, Any], name: str) -> str:
    """Why a side has no time: a few words of what went wrong, or nothing where the side has no such order."""
    return row["not timed"].get(name, "–").replace("|", "/")[:60]


def _names(rows: list[Mapping[str, Any]], key: str) -> list[str]:
    """The sides of any row: the library's, plain JAX, peers."""
    seen = dict.fromkeys(name for row in rows for part in (key, "float64 differences") for name in row.get(part, {}))
    return sorted(seen, key=lambda name: (name in PEERS, not name.startswith("library")))


def _checked(rows: list[Mapping[str, Any]]):
    names = _names(rows, "float64 differences")

    def cells(row: Mapping[str, Any]) -> list[str]:
        found = [row["float64 differences"].get(name, "–") for name in names]
        texts = [x[:60] if isinstance(x, str) else f"{x:.1e}" for x in found]
        return [row["case"], row["order"], str(row["steps"]), *texts]

    return cells


def _markdown(header: list[str], rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
