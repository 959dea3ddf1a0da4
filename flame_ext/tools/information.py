"""``flame-ext information``: where in a text an exported model knows most of what follows, and on which tokens these peaks fall."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING

from flame_ext.errors import UserError
from flame_ext.tools.plot import FORMATS, figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 8  # sequences that are compared with each other


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "information", help="measure what an export knows of the future at each token of a text"
    )
    parser.add_argument("path", metavar="EXPORT", type=Path, help="an export with a future predictor (hf/step-N)")
    parser.add_argument("source", metavar="TEXT", type=Path, help="a file of text in UTF-8")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence, as in training (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="future_encoder.temperature of the run (default: 0.1)"
    )
    parser.add_argument("--top", type=int, default=15, help="tokens in the table (default: 15)")
    parser.add_argument("--output", type=Path, help="draw the curves: PNG, SVG or PDF")
    parser.add_argument("--draw", type=int, nargs=2, default=[0, 128], metavar=("FROM", "TO"), help="tokens to draw")
    parser.add_argument("--json", action="store_true", help="print an object with every token's figures instead")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Curves:
    """What :func:`flame_ext.analysis.future_information` says of each token of a text that has a future and a next token."""

    tokens: list[str]
    information: list[float]  # in nats
    loss: list[float]  # of the next token, in nats
    bound: float  # the most that the information can be: the logarithm of the number of summaries that are compared

    @property
    def threshold(self) -> float:
        """Above it lies a peak: the third quartile and 1.5 times the distance between the quartiles (Tukey's fence)."""
        first, _, third = quantiles(self.information, n=4)
        return third + 1.5 * (third - first)

    @property
    def peaks(self) -> list[int]:
        """Indices of the tokens with more information than the threshold."""
        return [i for i, value in enumerate(self.information) if value > self.threshold]


def run(options: argparse.Namespace) -> int:
    """Returns 0; every failure is raised as a UserError before anything is written."""
    if options.output is not None and options.output.suffix not in FORMATS:
        raise UserError(f"--output {str(options.output)!r}: expected a name that ends in {', '.join(FORMATS)}")
    if options.seq_len < 4 or options.temperature <= 0:
        raise UserError(f"--seq-len must be >= 4 and --temperature > 0, got {options.seq_len}, {options.temperature}")
    try:
        text = options.source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{options.source}: cannot be read as text in UTF-8: {e}") from e
    curves = measure(options.path, text, options.seq_len, options.temperature)
    if options.output is not None:
        figure = draw(curves, *options.draw)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.output)
    if options.json:
        print(json.dumps(asdict(curves) | {"threshold": curves.threshold, "peaks": curves.peaks}))
    else:
        print("\n".join(report(curves, options.top)))
    return 0


def measure(export: Path, text: str, seq_len: int, temperature: float) -> Curves:
    """Cuts the text into sequences, and these into parts of one size, of at most :data:`ROWS`, since the information that can be seen
    grows with the number of sequences that are compared. What is left over is left out.

    Raises a UserError if the export has no predictor of the future, or the text is shorter than a sequence.
    """
    import torch

    from flame_ext.analysis import future_information, load_with_heads
    from flame_ext.data.tokenizer import AutoHuggingFaceTokenizer

    model, heads = load_with_heads(export, dtype=torch.float32)
    if absent := [name for name in ("future_encoder", "future_predictor") if name not in heads]:
        raise UserError(f"{export} has no {' and no '.join(absent)}: train with both enabled")
    tokenizer = AutoHuggingFaceTokenizer(str(export))
    ids = torch.tensor(tokenizer.ids(text), dtype=torch.int64)
    sequences = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    if not len(sequences):
        raise UserError(f"the text has {len(ids)} tokens, less than one sequence: set --seq-len to at most that")
    rows = len(sequences) // -(-len(sequences) // ROWS)
    sequences = sequences[: len(sequences) // rows * rows]
    found = [future_information(model, heads, part, temperature) for part in sequences.split(rows)]
    future, loss = (torch.cat([getattr(part, name) for part in found]) for name in ("future", "next_token"))
    known = future.isfinite() & loss.isfinite()
    words = [tokenizer.decode([int(token)]) for token in sequences[known]]
    compared = rows * int(known[0].sum())
    return Curves(words, future[known].tolist(), loss[known].tolist(), float(torch.tensor(float(compared)).log()))


def report(curves: Curves, top: int) -> list[str]:
    """Returns the lines of the summary and of the table of the ``top`` tokens by their number of peaks, in Markdown."""
    peaks, occurrences = curves.peaks, Counter(curves.tokens)
    on, values = Counter(curves.tokens[i] for i in peaks), defaultdict(list)
    for token, value in zip(curves.tokens, curves.information, strict=True):
        values[token].append(value)
    lines = [
        f"{len(curves.tokens):,} tokens: {fmean(curves.information):.3f} nats of information on the future on average "
        f"(at most {curves.bound:.3f}), loss of the next token {fmean(curves.loss):.3f}",
        f"{len(peaks):,} peaks, above {curves.threshold:.3f} nats",
        "",
        "| token | peaks | occurrences | mean information |",
        "|---|---|---|---|",
    ]
    for token, count in on.most_common(top):
        shown = json.dumps(token, ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| `{shown}` | {count} | {occurrences[token]} | {fmean(values[token]):.3f} |")
    return lines


def draw(curves: Curves, begin: int, end: int) -> Figure:
    """Draws information and loss of the tokens from ``begin`` to ``end``, and names the tokens of the peaks."""
    begin, end = max(0, begin), min(end, len(curves.tokens))
    if begin >= end:
        raise UserError(f"--draw: no tokens between {begin} and {end}; the text has {len(curves.tokens)}")
    figure = figure_class("information")(figsize=(10, 4), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = range(begin, end)
    above.plot(steps, curves.information[begin:end], linewidth=1.2)
    above.axhline(curves.threshold, color="0.6", linewidth=0.8)
    above.set_title("information on the future, nats", fontsize=10)
    below.plot(steps, curves.loss[begin:end], linewidth=1.2, color="C1")
    below.set_title("loss of the next token, nats", fontsize=10)
    below.set_xlabel("token")
    for i in curves.peaks:
        if begin <= i < end:
            place = (i, curves.information[i])
            word = curves.tokens[i].strip() or repr(curves.tokens[i])
            above.annotate(word.replace("$", r"\$"), place, fontsize=7, ha="center", va="bottom")
    for panel in (above, below):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
