"""``llm-pruner recover``: train a pruned model, and keep it only if it became better."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from llm_pruner.cli import options
from llm_pruner.cli.output import check_json, command_line, speaks, write_json
from llm_pruner.cli.recovered import as_data, no_gain, show
from llm_pruner.cli.training_lines import Narrator
from llm_pruner.errors import Interrupted, UserError
from llm_pruner.files.disk import placed
from llm_pruner.runtime.memory import TRAINING, keep_kernels

if TYPE_CHECKING:
    from llm_pruner.data.formatting import Template

EXAMPLES = """\b
Examples:
  llm-pruner recover ./small --out better --data alpaca.jsonl --max-minutes 20
  llm-pruner recover ./small --out better --data self --teacher default
  llm-pruner recover ./small --out better --data yahma/alpaca-cleaned \\
      --preset paper
"""

_DATA, _TRAINING = "Data", "Training"
_TEACHER, _LORA, _BUDGET = "Teacher", "Adapters", "Budget"


def command(
    model: options.Model,
    out: options.Out,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SRC",
            help="self (the teacher writes), a hub dataset, or a .txt, .jsonl, .json or .parquet "
            "file of instructions, chats or text. May be given several times.",
            rich_help_panel=_DATA,
        ),
    ],
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a run that was interrupted, from its last checkpoint.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Throw an interrupted run away.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    keep_adapter: Annotated[
        bool,
        typer.Option(
            "--keep-adapter",
            help="Save the adapter too, in --out/adapter; it belongs to MODEL.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    max_shard_size: options.MaxShardSize = "5GB",
    json: options.JsonBesideOut = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Measure perplexity on this corpus before and after. May be given several times.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    perplexity_seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens in a window of it. [default: 2048 or the model's maximum]",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Use at most this many examples of each source. [default: all; 512 of self]",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Examples of each source to judge by. [default: one in 20, at most 256]",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How instructions are written: chat (the tokenizer's template), alpaca, or auto.",
            rich_help_panel=_DATA,
        ),
    ] = "auto",
    mask_prompt: Annotated[
        bool,
        typer.Option(
            "--mask-prompt", help="Learn only what the assistant says.", rich_help_panel=_DATA
        ),
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split of a hub dataset.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Field that holds a plain text.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="quick: minutes on a CPU; paper: LLM-Pruner's two epochs in batches of 64. "
            "Options given beside it win.",
            rich_help_panel=_TRAINING,
        ),
    ] = "quick",
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="lora, full (all weights) or norms (norm weights and biases).",
            rich_help_panel=_TRAINING,
        ),
    ] = "lora",
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="At its peak. [default: 1e-3 for quick, 1e-4 for paper, less for full]",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps to reach it, at most a tenth of the run. [default: 10; 100]",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How it falls to zero: linear or cosine. [default: cosine; linear]",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Samples in a step. [default: 4; 64]",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest sample, and length of a packed row. [default: 512; 256]",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(metavar="X", help="Of AdamW.", rich_help_panel=_TRAINING)
    ] = 0.0,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="Compute in bfloat16. [default: where the processor is faster at it]",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations twice instead of keeping them.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Spread the model over the processes of torchrun (FSDP).",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    report_to: Annotated[
        str,
        typer.Option(metavar="NAME", help="none, tensorboard or wandb.", rich_help_panel=_TRAINING),
    ] = "none",
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Of the data's order and the adapters.", rich_help_panel=_TRAINING
        ),
    ] = 0,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Passes over the data. [default: 1; 2]",
            show_default=False,
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="At most this many.", show_default=False, rich_help_panel=_BUDGET
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="End training, evaluated, within this time; the run is planned to fit.",
            show_default=False,
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    evaluations: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Times the held-out examples are scored on the way.",
            rich_help_panel=_BUDGET,
        ),
    ] = 10,
    patience: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Stop when so many scores brought no gain.",
            rich_help_panel=_BUDGET,
        ),
    ] = 3,
    save_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps between checkpoints. [default: at each score]",
            show_default=False,
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model to learn from.",
            show_default=False,
            rich_help_panel=_TEACHER,
        ),
    ] = None,
    distill_weight: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Of the teacher in the loss; the text has the rest. 0: it only writes for self.",
            rich_help_panel=_TEACHER,
        ),
    ] = 0.9,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of the teacher.", rich_help_panel=_TEACHER)
    ] = 1.0,
    teacher_top_k: Annotated[
        int,
        typer.Option(metavar="N", help="Likeliest tokens that are kept.", rich_help_panel=_TEACHER),
    ] = 64,
    distill_hidden: Annotated[
        float,
        typer.Option(
            metavar="WEIGHT",
            help="Of hidden states in the loss, layer by layer, on top; the teacher then runs in "
            "each step.",
            rich_help_panel=_TEACHER,
        ),
    ] = 0.0,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what it wrote and said there, for other runs. [default: only for this run]",
            show_default=False,
            rich_help_panel=_TEACHER,
        ),
    ] = None,
    lora_r: Annotated[int, typer.Option(metavar="N", help="Rank.", rich_help_panel=_LORA)] = 8,
    lora_alpha: Annotated[
        float, typer.Option(metavar="X", help="Scale times rank.", rich_help_panel=_LORA)
    ] = 16.0,
    lora_dropout: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="[default: 0 for quick, 0.05 for paper]",
            show_default=False,
            rich_help_panel=_LORA,
        ),
    ] = None,
    dora: Annotated[
        bool, typer.Option("--dora", help="Learn magnitudes apart.", rich_help_panel=_LORA)
    ] = False,
    rslora: Annotated[
        bool,
        typer.Option("--rslora", help="Scale by the root of the rank.", rich_help_panel=_LORA),
    ] = False,
    lora_start: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="default (no change), pissa or olora (principal parts).",
            rich_help_panel=_LORA,
        ),
    ] = "default",
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Train a pruned model, and keep it only if it became better."""
    keep_kernels(TRAINING)
    check_json(json, (model, teacher, *data, *(perplexity or ())), out)
    from llm_pruner.commands.evaluate import PerplexitySettings
    from llm_pruner.commands.recover import recover_checkpoint
    from llm_pruner.commands.recover_request import DataSettings, RecoverRequest, TeacherSettings
    from llm_pruner.recovery import DistillationSettings
    from llm_pruner.recovery import preset as make_settings
    from llm_pruner.settings.common import ModelSettings

    settings = make_settings(
        preset,
        method,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        schedule=schedule,
        batch_size=batch_size,
        epochs=epochs,
        seq_len=seq_len,
        max_steps=max_steps,
        max_minutes=max_minutes,
        evaluations=evaluations,
        patience=patience,
        save_every=save_every,
        weight_decay=weight_decay,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        report_to=report_to,
        lora_r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        lora_dora=dora,
        lora_rslora=rslora,
        lora_start=lora_start,
    )
    learned_from = None
    if distill_hidden and not (teacher and distill_weight):
        raise UserError(
            f"--distill-hidden {distill_hidden:g} goes with a teacher that is learned from; name "
            "it with --teacher, with a --distill-weight above 0"
        )
    if teacher_cache is not None and teacher is None:
        raise UserError(
            f"--teacher-cache {teacher_cache} keeps what a teacher says; name that with --teacher, "
            "or leave it out"
        )
    if teacher is not None:
        learned_from = TeacherSettings(
            ModelSettings(teacher, None, dtype, device, trust_remote_code),
            DistillationSettings(temperature, distill_weight, teacher_top_k, distill_hidden)
            if distill_weight
            else None,
            teacher_cache,
        )
    request = RecoverRequest(
        ModelSettings(model, revision, dtype, device, trust_remote_code),
        out,
        DataSettings(
            tuple(dict.fromkeys(data)),
            samples,
            split,
            text_field,
            cast("Template", template),
            mask_prompt,
            held_out,
        ),
        settings,
        teacher=learned_from,
        texts=tuple(perplexity or ()),
        text_settings=PerplexitySettings(seq_len=perplexity_seq_len),
        resume=resume,
        restart=restart,
        overwrite=overwrite,
        keep_adapter=keep_adapter,
        max_shard_size=max_shard_size,
        shard=shard,
        command=command_line(),
    )
    say = Narrator(quiet=json == "-") if speaks() else lambda _: None
    try:
        done = recover_checkpoint(request, say=say)
    except KeyboardInterrupt:
        if request.out.resolve() in placed or not request.work.is_dir():
            raise
        raise Interrupted("interrupted; go on with --resume") from None
    if not speaks():
        return
    write_json(as_data(done), json)
    if json != "-":
        show(done)
    if not done.gained:
        print(f"llm-pruner: {no_gain(done)}", file=sys.stderr)
