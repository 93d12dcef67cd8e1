"""Shows the structure of a model (`search.by_hand.analyze`) as tables and trees."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

BAR = 24  # characters of the largest importance
MOST_TREES = 4  # of layers that differ


def render(found: dict[str, Any]) -> RenderableType:
    """Return a model's structure as lines, tables and the tree of one layer. 1 MB is 1e6 bytes."""
    shown: list[RenderableType] = [*_summary(found), Text(), _parts_table(found), Text()]
    if found["layers"]:
        shown += [_tree(found), Text(), _layers(found), Text()]
    shown.append(_cuts_table(found) if found["cuts"] else Text(f"nothing can be cut: {_plain(found['uncuttable'])}"))
    return Group(*shown)


def _summary(found: Mapping[str, Any]) -> list[Text]:
    how = f", quantized ({_plain(found['quantization'])})" if found["quantization"] else ""
    size = f"{count(found['parameters'])} parameters, {megabytes(found['bytes'])} MB"
    if found["decode_bytes"] is not None:
        size += f"; a decode step reads {megabytes(found['decode_bytes'])} MB"
    names = ("num_attention_heads", "num_key_value_heads", "heads_per_group")
    heads, groups, each = (found[name] for name in names)
    layout = [f"{heads} query heads in {groups} groups of {each}"] if heads is not None else []
    layout += [f"head_dim {found['head_dim']}"] if found["head_dim"] is not None else []
    named = {"hidden size": "hidden_size", "FFN width": "intermediate_size", "vocabulary": "vocab_size"}
    widths = [f"{name} {found[key]}" for name, key in named.items() if found[key] is not None]
    widths.append("embedding and lm_head tied" if found["tied"] else "embedding and lm_head apart")
    return [
        Text(_plain(found["model"]), style="bold"),
        Text(f"{_plain(found['model_type'])}, {_plain(found['dtype'])}{how}: {size}"),
        *([Text(", ".join(layout))] if layout else []),
        Text(", ".join(widths)),
    ]


def _parts_table(found: Mapping[str, Any]) -> Table:
    table = _table("Parts", "part", "parameters", "MB", "share")
    for part in found["parts"]:
        if not part["count"]:
            if part["name"] == "lm_head":
                table.add_row("lm_head", "", "", "", Text("tied", style="dim"))
            continue
        table.add_row(part["name"], count(part["parameters"]), megabytes(part["bytes"]), percent(part["share"]))
        for inner in part["parts"] if len(part["parts"]) > 1 else ():
            row = (count(inner["parameters"]), megabytes(inner["bytes"]), percent(inner["share"]))
            table.add_row(f"  {_plain(inner['name'])}", *row, style="dim")
    table.add_section()
    table.add_row("all", count(found["parameters"]), megabytes(found["bytes"]), percent(1.0), style="bold")
    return table


def _tree(found: Mapping[str, Any]) -> RenderableType:
    """Return one layer of each kind, with the shapes of its weights, [out, in]."""
    runs = _runs(found["layers"])
    shown = runs[:MOST_TREES]
    trees = [_layer_tree(run, alone=len(runs) == 1) for run in shown]
    if len(runs) > len(shown):
        trees.append(Text(f"… and {len(runs) - len(shown)} more kinds of layers"))
    return Group(*trees)


def _layer_tree(run: list[dict[str, Any]], alone: bool) -> RenderableType:
    layer = run[0]
    what = f"one layer × {len(run)} layers" if alone else f"layer{'s' if len(run) > 1 else ''} {_span(run)}"
    each = " each" if len(run) > 1 else ""
    tree = Tree(Text(f"{what}: {count(layer['parameters'])} parameters, {megabytes(layer['bytes'])} MB{each}"))
    weights = [weight for part in layer["parts"] for weight in part["parts"]]
    shapes = {id(weight): _shape(weight) for weight in weights}
    name_width = max(len(_plain(weight["name"])) for weight in weights)
    shape_width = max(map(len, shapes.values()))
    for part in layer["parts"]:
        if not part["parts"]:
            continue
        branch = tree.add(Text(f"{part['name']}  {count(part['parameters'])}  {megabytes(part['bytes'])} MB"))
        for weight in part["parts"]:
            dtype = f"  {weight['dtype']}" if weight["dtype"] and len({w["dtype"] for w in weights}) > 1 else ""
            branch.add(
                Text(
                    f"{_plain(weight['name']):<{name_width}}  {shapes[id(weight)]:<{shape_width}}  "
                    f"{count(weight['parameters']):>7}{dtype}"
                )
            )
    return tree


def _layers(found: Mapping[str, Any]) -> RenderableType:
    """Return a table of all layers where importance was measured, else of the kinds of layers."""
    layers = found["layers"]
    runs = _runs(layers)
    alike = len(runs) == 1
    each = f"{count(layers[0]['parameters'])} parameters, {megabytes(layers[0]['bytes'])} MB, "
    line = Text(f"{len(layers)} layers, all alike: {each}{percent(layers[0]['share'])} each")
    if found["drop_order"] is None:
        if alike:
            return line
        table = _table("Layers", "layers", "parameters each", "MB each", "share each")
        for run in runs:
            size = (count(run[0]["parameters"]), megabytes(run[0]["bytes"]), percent(run[0]["share"]))
            table.add_row(_span(run), *size)
        return table
    sizes = () if alike else ("parameters", "MB", "share")
    table = _table("Importance by layer", "layer", *sizes, "influence")
    table.add_column("")
    table.add_column("goes", justify="right")
    rank = {index: place for place, index in enumerate(found["drop_order"], start=1)}
    most = max(layer["block_influence"] for layer in layers)
    for place, layer in enumerate(layers):
        size = (count(layer["parameters"]), megabytes(layer["bytes"]), percent(layer["share"]))
        bar = "█" * round(BAR * layer["block_influence"] / most) if most > 0 else ""
        order = Text(
            str(rank[place]) if place in rank else "stays", style="bold" if rank.get(place, 99) <= 3 else "dim"
        )
        table.add_row(
            str(layer["index"]), *(size if sizes else ()), f"{layer['block_influence']:.4f}", Text(bar or "▏"), order
        )
    first = ", ".join(str(layers[place]["index"]) for place in found["drop_order"][:5])
    what = Text("influence: 1 − cos of a layer's input and output; the smaller, the less the layer does", style="dim")
    goes = [what, *([Text(f"layers that would go first: {first}")] if first else [])]
    return Group(*([line] if alike else []), table, *goes)


def _cuts_table(found: Mapping[str, Any]) -> Table:
    cuts = found["cuts"]
    head = any(
        cut["decode_bytes_saved"] != cut["bytes_saved"] for cut in cuts
    )  # a decode step reads little of an untied embedding
    reasons = any(cut["infeasible"] for cut in cuts)
    columns = ["cut", "parameters", "MB", "share", *(["MB a step"] if head else [])]
    table = _table("What could be cut, and what each alone would save", *columns)
    if reasons:
        table.add_column("not here, because")
    for cut in cuts:
        row = [cut["what"], "–", "–", "–", *(["–"] if head else [])]
        if cut["bytes_saved"] is not None:
            row[1:4] = [count(cut["parameters_saved"]), megabytes(cut["bytes_saved"]), percent(cut["share"])]
            if head:
                row[4] = megabytes(cut["decode_bytes_saved"])
        if reasons:
            row.append(cut["infeasible"] or "")
        table.add_row(*map(Text, row), style="dim" if cut["infeasible"] else "")
    return table


def _runs(layers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the layers in runs of neighbours that are alike."""
    return [list(run) for _, run in itertools.groupby(layers, key=lambda layer: layer["parts"])]


def _span(run: list[dict[str, Any]]) -> str:
    first, last = run[0]["index"], run[-1]["index"]
    return str(first) if first == last else f"{first}–{last}"


def _shape(weight: Mapping[str, Any]) -> str:
    shape = str(weight["shape"]) if weight["shape"] is not None else "[…]"
    return f"{shape} × {weight['count']}" if weight["count"] > 1 else shape


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
