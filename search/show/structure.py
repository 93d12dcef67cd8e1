"""Shows the analysis of a model as tables and trees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from compressors.model.structure import LayerStructure, Part
from search.show.analysis import Analysis

BAR = 24  # characters of the largest importance
MOST_TREES = 4  # trees that are shown where layers differ


def render(analysis: Analysis) -> RenderableType:
    """Return an analysis as lines, tables and the tree of one layer. 1 MB is 1e6 bytes."""
    shown: list[RenderableType] = [*_summary(analysis), Text(), _parts_table(analysis), Text()]
    if analysis.structure.layers:
        shown += [_trees(analysis), Text(), _layers(analysis), Text()]
    why = f"nothing can be cut: {_plain(analysis.structure.uncuttable)}"
    shown.append(_cuts_table(analysis) if analysis.cuts else Text(why))
    return Group(*shown)


def _summary(analysis: Analysis) -> list[Text]:
    model = analysis.structure
    how = f", quantized ({_plain(model.quantization)})" if model.quantization else ""
    size = f"{count(model.parameters)} parameters, {megabytes(model.bytes)} MB"
    if model.decode_bytes is not None:
        size += f"; a decode step reads {megabytes(model.decode_bytes)} MB"
    layout = []
    if model.num_attention_heads is not None:
        groups, each = model.num_key_value_heads, model.heads_per_group
        layout.append(f"{model.num_attention_heads} query heads in {groups} groups of {each}")
    layout += [f"head_dim {model.head_dim}"] if model.head_dim is not None else []
    named = {"hidden size": model.hidden_size, "FFN width": model.intermediate_size, "vocabulary": model.vocab_size}
    widths = [f"{name} {width}" for name, width in named.items() if width is not None]
    widths.append("embedding and lm_head tied" if model.tied else "embedding and lm_head apart")
    return [
        Text(_plain(analysis.model), style="bold"),
        Text(f"{_plain(model.model_type)}, {_plain(model.dtype)}{how}: {size}"),
        *([Text(", ".join(layout))] if layout else []),
        Text(", ".join(widths)),
    ]


def _parts_table(analysis: Analysis) -> Table:
    table = _table("Parts", "part", "parameters", "MB", "share")
    for part in analysis.structure.parts:
        if not part.count:
            if part.name == "lm_head":
                table.add_row("lm_head", "", "", "", Text("tied", style="dim"))
            continue
        table.add_row(part.name, *_sizes(analysis, part))
        for inner in part.parts if len(part.parts) > 1 else ():
            table.add_row(f"  {_plain(inner.name)}", *_sizes(analysis, inner), style="dim")
    table.add_section()
    model = analysis.structure
    table.add_row("all", count(model.parameters), megabytes(model.bytes), percent(1.0), style="bold")
    return table


def _sizes(analysis: Analysis, part: Part) -> tuple[str, str, str]:
    """Return the parameters, the MB and the share of a part."""
    return count(part.parameters), megabytes(part.bytes), percent(analysis.share(part))


def _trees(analysis: Analysis) -> RenderableType:
    """Return one layer of each kind, with the shapes of its weights, [out, in]."""
    runs = _runs(analysis.structure.layers)
    shown = runs[:MOST_TREES]
    trees = [_layer_tree(run, alone=len(runs) == 1) for run in shown]
    if len(runs) > len(shown):
        trees.append(Text(f"… and {len(runs) - len(shown)} more kinds of layers"))
    return Group(*trees)


def _layer_tree(run: Sequence[LayerStructure], alone: bool) -> RenderableType:
    layer = run[0].total
    what = f"one layer × {len(run)} layers" if alone else f"layer{'s' if len(run) > 1 else ''} {_span(run)}"
    each = " each" if len(run) > 1 else ""
    tree = Tree(Text(f"{what}: {count(layer.parameters)} parameters, {megabytes(layer.bytes)} MB{each}"))
    weights = [weight for part in layer.parts for weight in part.parts]
    several = len({weight.dtype for weight in weights}) > 1
    name_width = max(len(_plain(weight.name)) for weight in weights)
    shape_width = max(len(_shape(weight)) for weight in weights)
    for part in layer.parts:
        if not part.parts:
            continue
        branch = tree.add(Text(f"{part.name}  {count(part.parameters)}  {megabytes(part.bytes)} MB"))
        for weight in part.parts:
            dtype = f"  {weight.dtype}" if weight.dtype and several else ""
            name, shape = f"{_plain(weight.name):<{name_width}}", f"{_shape(weight):<{shape_width}}"
            branch.add(Text(f"{name}  {shape}  {count(weight.parameters):>7}{dtype}"))
    return tree


def _layers(analysis: Analysis) -> RenderableType:
    """Return a table of all layers where importance was measured, else of the kinds of layers."""
    layers = analysis.structure.layers
    runs = _runs(layers)
    alike = len(runs) == 1
    parameters, size, share = _sizes(analysis, layers[0].total)
    line = Text(f"{len(layers)} layers, all alike: {parameters} parameters, {size} MB, {share} each")
    if analysis.block_influence is not None:
        return Group(*([line] if alike else []), *_importance(analysis, with_sizes=not alike))
    if alike:
        return line
    table = _table("Layers", "layers", "parameters each", "MB each", "share each")
    for run in runs:
        table.add_row(_span(run), *_sizes(analysis, run[0].total))
    return table


def _importance(analysis: Analysis, with_sizes: bool) -> list[RenderableType]:
    """Return the table of the layers' importance, and lines that explain it."""
    layers, influence, order = analysis.structure.layers, analysis.block_influence or (), analysis.drop_order or ()
    table = _table("Importance by layer", "layer", *(("parameters", "MB", "share") if with_sizes else ()), "influence")
    table.add_column("")
    table.add_column("goes", justify="right")
    rank = {place: number for number, place in enumerate(order, start=1)}
    most = max(influence)
    for place, (layer, value) in enumerate(zip(layers, influence, strict=True)):
        bar = "█" * round(BAR * value / most) if most > 0 else ""
        number = rank.get(place)
        goes = Text("stays" if number is None else str(number), style="bold" if number and number <= 3 else "dim")
        sizes = _sizes(analysis, layer.total) if with_sizes else ()
        table.add_row(str(layer.index), *sizes, f"{value:.4f}", Text(bar or "▏"), goes)
    what = Text("influence: 1 − cos of a layer's input and output; the smaller, the less the layer does", style="dim")
    first = ", ".join(str(layers[place].index) for place in order[:5])
    return [table, what, *([Text(f"layers that would go first: {first}")] if first else [])]


def _cuts_table(analysis: Analysis) -> Table:
    cuts = analysis.cuts
    # a decode step reads little of an untied embedding
    by_step = any(cut.decode_bytes_saved != cut.bytes_saved for cut in cuts)
    reasons = any(cut.infeasible for cut in cuts)
    columns = ["cut", "parameters", "MB", "share", *(["MB a step"] if by_step else [])]
    table = _table("What could be cut, and what each alone would save", *columns)
    if reasons:
        table.add_column("not here, because")
    for cut in cuts:
        row = [cut.what, "–", "–", "–", *(["–"] if by_step else [])]
        if cut.bytes_saved is not None and cut.parameters_saved is not None and cut.share is not None:
            row[1:4] = [count(cut.parameters_saved), megabytes(cut.bytes_saved), percent(cut.share)]
            if by_step and cut.decode_bytes_saved is not None:
                row[4] = megabytes(cut.decode_bytes_saved)
        if reasons:
            row.append(cut.infeasible or "")
        table.add_row(*map(Text, row), style="dim" if cut.infeasible else "")
    return table


def _runs(layers: Sequence[LayerStructure]) -> list[list[LayerStructure]]:
    """Return the layers in runs of neighbours that are alike."""
    return [list(run) for _, run in itertools.groupby(layers, key=lambda layer: layer.total.parts)]


def _span(run: Sequence[LayerStructure]) -> str:
    first, last = run[0].index, run[-1].index
    return str(first) if first == last else f"{first}–{last}"


def _shape(weight: Part) -> str:
    shape = str(list(weight.shape)) if weight.shape is not None else "[…]"
    return f"{shape} × {weight.count}" if weight.count > 1 else shape


def _table(title: str, *columns: str) -> Table:
    """Return a table with words in its first column and numbers in the others."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _plain(text: object) -> str:
    """Return text from a file without the characters that would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "�" for letter in str(text))


def count(number: int) -> str:
    """Return a number in short, such as `1.28B`, `134.52M`, `35.1k` or `576`."""
    for size, letter, digits in ((1e9, "B", 2), (1e6, "M", 2), (1e3, "k", 1)):
        if abs(number) >= size:
            return f"{number / size:.{digits}f}{letter}"
    return str(number)


def megabytes(number: int) -> str:
    """Return a number of bytes in MB (1e6 bytes)."""
    return "<0.01" if 0 < number < 5000 else f"{number / 1e6:,.2f}"


def percent(share: float) -> str:
    """Return a share in percent."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
