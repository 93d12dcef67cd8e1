"""Defines the command `compress`: a subcommand for each method, with an option for each choice that it takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from compressors.choices import DTYPES, SCHEMES, Choice
from compressors.plan import CHOICES
from search.cli import completion
from search.cli.completion import one_of
from search.cli.main import main
from search.cli.options import (
    PATH,
    TEXT,
    StudyCommand,
    json_option,
    load_file,
    print_table,
    study_options,
    study_words,
    values_of,
    write_groups,
)

if TYPE_CHECKING:
    from search.by_hand.compress import Compressed, Outcome
    from search.by_hand.multirun import Job

BY_CONFIG = "by-config"
METHOD_GROUPS = ("model", "evaluation", "tracking")
COMPRESSING = (*METHOD_GROUPS, "experiments")


class Methods(click.Group):
    """`compress` with a method's name, or without one: then the study file and its overrides choose the plan."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Treat the words as overrides where the first one is no method."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [BY_CONFIG, *args]
        return super().parse_args(context, args or ["--help"])

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the methods; the command that takes only overrides is hidden."""
        return [name for name in super().list_commands(context) if name != BY_CONFIG]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the methods, keys and groups that begin with what was typed."""
        return [*super().shell_complete(ctx, incomplete), *completion.words(ctx, None, incomplete)]

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the config groups and what each offers."""
        write_groups(formatter, COMPRESSING)


@main.group("compress", cls=Methods)
def compress_group() -> None:
    """Compress a model by hand, or several, with the plans and the code of a study's trials.

    \b
    optuna-search compress drop-layers --keep-layers 26 --save-path submit/model_drop26
    optuna-search compress experiments=drop_layers            a file of studies/experiments
    optuna-search compress compression.keep_layers=24 compression.scheme=W8A8 experiment_name=drop24_w8a8
    optuna-search compress -m compression.keep_layers=22,24,26,28   multirun: compress and evaluate each, and compare
    """


def method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every method has."""
    for option in (
        json_option(),
        click.option("--evaluate", "evaluated", is_flag=True, help="Measure the result against the baseline."),
        click.option(
            "-m",
            "--multirun",
            is_flag=True,
            help="Compress and evaluate a model for each of the listed values, and compare them.",
        ),
        click.option(
            "--for-transformers",
            type=TEXT,
            help="Version of transformers that is to read the result, such as 4.57.3 [default: the study file's].",
        ),
        click.option(
            "--save-path",
            type=PATH,
            help="Directory to write [default: submit/model; of a multirun submit/model_NAME].",
        ),
        click.option("--model", type=PATH, help="Base model, which is compressed [default: the study file's]."),
    ):
        command = option(command)
    return study_options(command)


def choice_options(method: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add an option for each choice that `method` takes (`compressors.plan.CHOICES`)."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for name, record in reversed(CHOICES.items()):
            if method in record.methods:
                command = click.option(
                    f"--{name.replace('_', '-')}",
                    metavar=_metavar(name, record),
                    help=_help(record),
                    shell_complete=one_of(record.values),
                )(command)
        return command

    return add


def _metavar(name: str, record: Choice) -> str:
    if record.is_number:
        return "N"
    return "|".join([*map(str, record.values), *(["LIST"] if name == "drop_from" else [])])


def _help(record: Choice) -> str:
    return f"{record.help.rstrip('.')} [default: {record.default}]."


@compress_group.command(BY_CONFIG, cls=StudyCommand, groups=COMPRESSING)
@method_options
def by_config_command(**options: Any) -> None:
    """Build what the study file, an experiment and the overrides name."""
    _compress({}, **options)


@compress_group.command("drop-layers", cls=StudyCommand, groups=METHOD_GROUPS)
@click.option("--keep-layers", metavar="N", help="Number of layers that stay [default: those that LIST leaves].")
@choice_options("drop_layers")
@method_options
def drop_layers_command(keep_layers: str | None, drop_from: str | None, **options: Any) -> None:
    """Drop layers.

    \b
    optuna-search compress drop-layers --keep-layers 26 --drop-from kl --repair stream
    optuna-search compress drop-layers --drop-from 20,21
    """
    listed = drop_from is not None and drop_from[:1].isdigit()
    keys = {"keep_layers": keep_layers, "drop_from": f"[{drop_from}]" if listed else drop_from}
    _method("drop_layers", keys, options)


@compress_group.command("prune-heads", cls=StudyCommand, groups=METHOD_GROUPS)
@click.option("--keep-heads", metavar="N", help="Number of query heads that stay [default: all, or those that share].")
@click.option("--keep-kv-heads", metavar="N", help="Number of key/value heads that stay [default: all].")
@choice_options("prune_heads")
@method_options
def prune_heads_command(**options: Any) -> None:
    """Remove attention heads; a key/value head goes with the query heads that share it.

    \b
    optuna-search compress prune-heads --keep-heads 24 --importance energy --repair stream
    """
    _method("prune_heads", {}, options)


@compress_group.command("reduce-hidden", cls=StudyCommand, groups=METHOD_GROUPS)
@click.option("--target-dim", metavar="N", required=True, help="hidden_size of the result.")
@choice_options("reduce_hidden")
@method_options
def reduce_hidden_command(target_dim: str, **options: Any) -> None:
    """Narrow the residual stream.

    \b
    optuna-search compress reduce-hidden --target-dim 1536 --rotation pca --repair stream
    """
    _method("reduce_hidden", {"hidden_size": target_dim}, options)


@compress_group.command("reduce-ffn", cls=StudyCommand, groups=METHOD_GROUPS)
@click.option("--target-dim", metavar="N", required=True, help="intermediate_size of the result.")
@choice_options("reduce_ffn")
@method_options
def reduce_ffn_command(target_dim: str, **options: Any) -> None:
    """Narrow the feed-forward networks.

    \b
    optuna-search compress reduce-ffn --target-dim 3584 --importance energy --repair stream
    """
    _method("reduce_ffn", {"intermediate_size": target_dim}, options)


@compress_group.command("quantize", cls=StudyCommand, groups=METHOD_GROUPS)
@click.option(
    "--scheme",
    metavar="|".join(SCHEMES),
    shell_complete=one_of(SCHEMES),
    required=True,
    help="Scheme of compressed-tensors.",
)
@choice_options("quantize")
@method_options
def quantize_command(**options: Any) -> None:
    """Round the weights to a compressed-tensors scheme.

    \b
    optuna-search compress quantize --scheme W8A8 --smoothing smoothquant --quantizer gptq
    """
    _method("quantize", {}, options)


@compress_group.command("cast", cls=StudyCommand, groups=METHOD_GROUPS)
@click.option(
    "--dtype",
    metavar="|".join(DTYPES),
    shell_complete=one_of(DTYPES),
    required=True,
    help="Floating-point type of the result.",
)
@method_options
def cast_command(dtype: str, **options: Any) -> None:
    """Cast the weights to another floating-point type.

    \b
    optuna-search compress cast --dtype float16
    """
    _compress({"method": "cast", "dtype": dtype}, **options)


@compress_group.command("distill", cls=StudyCommand, groups=METHOD_GROUPS)
@study_options
@click.option("--student", type=PATH, required=True, help="Cut model that is not quantized.")
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Length of the training in tokens [default: distillation.tokens]."
)
@click.option("--model", type=PATH, help="Teacher [default: the study file's model].")
@click.option("--save-path", type=PATH, help="Directory to write [default: submit/model_kd_NAME].")
@click.option(
    "--for-transformers",
    type=TEXT,
    help="Version of transformers that is to read the result, such as 4.57.3 [default: the study file's].",
)
@json_option("Print JSON to standard output [default: two lines].")
def distill_command(
    student: Path,
    tokens: int | None,
    model: Path | None,
    save_path: Path | None,
    for_transformers: str | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Train a cut model to give the original's distributions (KL on the logits); a killed call resumes.

    \b
    optuna-search compress distill --student submit/model_drop28 --tokens 2000000
    optuna-search compress quantize --model submit/model_kd_drop28 --scheme W8A8 --save-path submit/model_kd_drop28_w8a8
    """
    file = load_file(**where, model__source=model, export__for_transformers=for_transformers)

    from search.by_hand import distill
    from search.setup import setting
    from search.show import progress

    named = student.resolve() if student.name in ("", "..") else student  # . has no name
    to = save_path or named.parent / f"model_kd_{named.name.removeprefix('model').strip('_') or 'model'}"
    with progress.Live(1) as live:
        prepared = setting.prepare(file, live.say, search=False, engine=False, warn=live.warn)
        wanted = tokens or file.distillation.tokens
        result = distill.distill_model(prepared, student, wanted, to, file.export.for_transformers, live.say)
    if as_json:
        click.echo(json.dumps({**distill.facts(result), "path": str(to)}))
        return
    click.echo(
        f"held-out KL {result.kl_before:.4f} → {result.kl_best:.4f} in {result.tokens:,} tokens, "
        f"{result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens per second ({result.stopped})"
    )
    click.echo(f"written: {to}")


def _method(method: str, keys: dict[str, str | None], options: dict[str, Any]) -> None:
    """Run a method with its own keys; its choices and sizes are among the options."""
    own = {
        name: options.pop(name) for name in list(options) if name in (*CHOICES, "keep_heads", "keep_kv_heads", "scheme")
    }
    _compress({"method": method, **keys, **own}, **options)


def _compress(
    keys: dict[str, str | None],
    model: Path | None,
    save_path: Path | None,
    for_transformers: str | None,
    multirun: bool,
    evaluated: bool,
    as_json: bool,
    study: str,
    config_dir: Path | None,
    overrides: tuple[str, ...],
) -> None:
    from search.by_hand.multirun import plan_jobs, run_jobs, with_baseline
    from search.config import compose
    from search.config.words import word_of
    from search.show import progress

    options = values_of(model__source=model, export__for_transformers=for_transformers)
    again = [word_of(key, value) for key, value in options.items()]
    asked = {f"compression.{key}": value for key, value in keys.items() if value is not None}
    listed = [f"{key}={value}" for key, value in asked.items()]
    files = []
    for words in compose.sweep([*listed, *overrides], config_dir) if multirun else [[*listed, *overrides]]:
        if multirun:
            file = compose.load(study, words, config_dir, options)
        else:  # a value is taken as it is, unless a word sets its key too
            set_before = {word.partition("=")[0].lstrip("+") for word in overrides}
            own = {key: _value(text) for key, text in asked.items() if key not in set_before}
            file = compose.load(study, overrides, config_dir, {**own, **options})
        files.append((file, study_words(study, config_dir, (*words, *again))))
    with progress.Live(len(files)) as live:
        planned = plan_jobs(files, save_path, live.say, engine=multirun or evaluated, multirun=multirun)
        if multirun or evaluated:
            rows = run_jobs(planned, live.say, live.warn, live.job_ended)
        else:
            outcome, result = _compress_one(planned[0], live)
    if not (multirun or evaluated):
        _print_compressed(outcome, result, as_json)
        return
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in rows]))
    else:
        from search.show import tables

        print_table(tables.comparison(with_baseline(rows)))
    if any(row.result is None for row in rows):
        sys.exit(1)


def _value(text: str) -> Any:
    """Return the value of an option: an integer, a list of what is in brackets, or the text itself."""
    if text.startswith("[") and text.endswith("]"):
        return [_value(part.strip()) for part in text[1:-1].split(",")]
    return int(text) if text.isdecimal() and text.isascii() else text


def _compress_one(job: Job, live: Any) -> tuple[Outcome, Compressed]:
    """Show what the plan builds, then build it."""
    from search.by_hand import compress
    from search.setup import setting
    from search.show import tables

    prepared = setting.prepare(job.file, live.say, search=False, engine=False, warn=live.warn)
    outcome = compress.foresee(job.plan, prepared)
    live.print(tables.outcome_table(compress.to_json(outcome), prepared.model.identity.to_dict()))
    for warning in outcome.warnings:
        live.warn(warning)
    return outcome, compress.compress(outcome, prepared, job.path, job.file.export.for_transformers, live.say)


def _print_compressed(outcome: Outcome, result: Compressed, as_json: bool) -> None:
    from search.by_hand import compress

    if as_json:
        click.echo(json.dumps({**compress.to_json(outcome), "path": str(result.path), "reused": result.reused}))
        return
    for change in result.changes:
        click.echo(change)
    how = "already up to date" if result.reused else "written, in place of another" if result.replaced else "written"
    click.echo(f"{how}: {result.path}")
