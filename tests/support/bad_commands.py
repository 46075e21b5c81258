"""Commands that are refused before work begins, with what is said.

``python tests/support/bad_commands.py`` writes ``docs/before-work.md`` from them.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from llm_pruner.settings.registry import CRITERIA

PAGE = Path(__file__).resolve().parents[2] / "docs/before-work.md"

LONG = "n" * 300
BASES = {
    "prune": "prune m --out o --ratio 0.2 --calibration t.txt",
    "curve": "curve m --out o --calibration t.txt",
    "recover": "recover m --out o --data t.txt",
    "compress": "compress m --out o --calibration t.txt --data t.txt",
    "evaluate": "evaluate m --perplexity t.txt",
    "bench": "bench m",
    "chat": "chat m",
    "export": "export m --out o.gguf",
    "vocab": "vocab m --text t.txt --out o",
    "inspect": "inspect m",
    "compare": "compare m",
}
"""The good commands that the options are added to; ``m`` is a checkpoint, ``t.txt`` a text."""
INSTEAD = {
    **dict.fromkeys(("--params", "--unit-ratio", "--kv-cache"), "--ratio"),
    "--speed": "--perplexity",
}
"""Options that stand in place of another of a good command."""

WRITERS, PRUNERS = ("prune", "curve", "recover", "compress"), ("prune", "recover")
LOADERS = (*WRITERS, "evaluate", "bench", "inspect", "chat")


@dataclass(frozen=True)
class Bad:
    """Options that are refused.

    Attributes:
        commands: that they are given to.
        options: as they are typed after the good command, whose own they replace.
        message: what is said; an ellipsis at its end stands for the rest.
    """

    commands: tuple[str, ...]
    options: str
    message: str

    @property
    def shown(self) -> str:
        """The options as the page shows them."""
        return self.options.replace(LONG, "nnn…")


def bad(commands: str | tuple[str, ...], *rows: tuple[str, str]) -> list[Bad]:
    """Return a row for each pair of options and message."""
    names = (commands,) if isinstance(commands, str) else commands
    return [Bad(names, options, message) for options, message in rows]


def between(name: str, given: object, least: object, most: object) -> str:
    """Return what is said of a number that is out of bounds."""
    return f"{name} {given} is outside {least} to {most}; give a number in between"


SIZE = "is no size of a file; use a number above 0 with KB, MB, GB or TB, such as 5GB"
SHARE = "is outside (0, 1); give the share to remove, such as 0.2"
STRUCTURES = "heads, query_heads, ffn, hidden, head_dim, experts, layers, other"
DAMAGE = (
    "is no damage; write such as 1.2x, for the dense model's perplexity times 1.2, or 0.3, for a "
    "KL divergence of 0.3 nats"
)
LITTLE = ("1x", "0.9x", "0", "-1", "nan", "little")
NO_TEXT = "nofile.txt does not exist; check the path of the text file"
SHORT = (
    "t.txt gives 9000 tokens; 90 samples of 128 tokens need 11520; use --samples 70 or a longer "
    "text"
)
NO_MULTIPLE = "is no number; use such as 32, or auto, blocks, gguf, gptq, marlin, or tp4"
COUNT = "is not a number of parameters; write such as 5.4B, 107.6M or 110000000"

TABLE: dict[str, list[Bad]] = {
    "Where the result goes": [
        *bad(
            WRITERS,
            (f"--out {LONG}", "--out nnnnnnnnnnnnnnnnnnnn... has 300 bytes, and the file system…"),
            (f"--out x/{LONG}", "--out nnnnnnnnnnnnnnnnnnnn... has 300 bytes, and the file…"),
            (
                "--out file/x",
                "file/x cannot be made, since file is not a folder that may be written; give "
                "another --out",
            ),
            (
                "--out file",
                "file is a file, but the output is a folder; choose another name",
            ),
            (
                "--out /proc/x/y",
                "/proc/x/y cannot be made, since /proc is not a folder that may be written…",
            ),
            (
                "--out m",
                "m exists and is not empty, so nothing was written; choose another folder or pass "
                "--overwrite",
            ),
        ),
        *bad(
            (*LOADERS, "compare"),
            ("--json m", "--json m is a folder; name the file to write"),
            ("--json ''", "--json is empty; name the file to write, or - for stdout"),
            (f"--json {LONG}", "--json nnnnnnnnnnnnnnnnnnnn... has 300 bytes, and the file…"),
            (
                "--json file/x",
                "file/x cannot be made, since file is not a folder that may be written; give "
                "another --json",
            ),
            (
                "--json /proc/x/y",
                "/proc/x/y cannot be made, since /proc is not a folder that may be written…",
            ),
        ),
        *bad(
            PRUNERS,
            ("--json o", "--json o is used by this command otherwise; name another file"),
        ),
        *bad(
            "curve",
            (
                "--json o/plan-0.2.json",
                "--json o/plan-0.2.json is used by this command otherwise; name another file",
            ),
        ),
        *bad(
            "export",
            ("--json o.gguf", "--json o.gguf is used by this command otherwise; name another file"),
        ),
        *bad(
            "inspect",
            (
                "--config ~of-nobody/x",
                "--config ~of-nobody/x cannot be read as UTF-8 text; give a YAML…",
            ),
        ),
        *bad(
            "compare",
            ("--html m", "--html m is a folder; name the file to write"),
            (f"--html {LONG}", "--html nnnnnnnnnnnnnnnnnnnn... has 300 bytes, and the file…"),
        ),
        *bad(
            "recover",
            (
                "--teacher m --teacher-cache file",
                "file/cache cannot be made, since file is not a folder that may be written; give "
                "another --teacher-cache",
            ),
            (
                "--teacher dense --teacher-cache o/c",
                "--teacher-cache o/c lies in o, which this run writes; name a folder of its own",
            ),
            (
                "--teacher dense --teacher-cache o.recovering",
                "--teacher-cache o.recovering lies in o.recovering, which this run writes; name a "
                "folder of its own",
            ),
            (
                "--teacher-cache c",
                "--teacher-cache c keeps what a teacher says; name that with --teacher, or leave "
                "it out",
            ),
        ),
        *bad(
            (*PRUNERS, "compress"),
            ("--max-shard-size 5XB", f"--max-shard-size '5XB' {SIZE}"),
            ("--max-shard-size 0", f"--max-shard-size '0' {SIZE}"),
            ("--max-shard-size 0GB", f"--max-shard-size '0GB' {SIZE}"),
            ("--max-shard-size -1GB", f"--max-shard-size '-1GB' {SIZE}"),
            ("--max-shard-size nanGB", f"--max-shard-size 'nanGB' {SIZE}"),
            ("--max-shard-size infGB", f"--max-shard-size 'infGB' {SIZE}"),
            ("--max-shard-size 5", f"--max-shard-size '5' {SIZE}"),
        ),
        *bad(
            (*PRUNERS, "compress", "vocab"),
            ("--private", "--private is about --push-to-hub REPO; add that, or leave it out"),
            (
                "--push-to-hub 'my model'",
                "--push-to-hub my model is no repository; write such as me/small",
            ),
            (
                "--push-to-hub me/small",
                "--push-to-hub me/small needs an account of the hub; run 'hf auth login', or set "
                "HF_TOKEN",
            ),
        ),
        *bad(
            "prune",
            (
                "--push-to-hub me/small --dry-run",
                "--push-to-hub me/small is about a model, and --dry-run writes a plan; leave one "
                "out",
            ),
        ),
    ],
    "The model": [
        *bad(
            LOADERS,
            (
                "--dtype float8",
                "dtype 'float8' is unknown; use one of float32, float64, bfloat16, float16, auto",
            ),
            ("--device gpu", "device 'gpu' cannot be used here (RuntimeError: Expected one of…"),
            (
                "--device meta",
                "device 'meta' cannot be used here (RuntimeError: it holds no numbers); use cpu or "
                "one that is there",
            ),
            (
                "--revision ''",
                "--revision is empty; name a branch, tag or commit, or leave it out",
            ),
            (
                "--revision v2",
                "--revision v2 is of models on the hub, and m is on this machine; leave it out",
            ),
        ),
        *bad(
            "recover",
            (
                "--teacher file",
                "file is a file that is no .gguf; name a folder, a .gguf file or a hub id",
            ),
            (
                "--control m",
                "--control m is the model that is recovered; name the dense model that it was cut "
                "from",
            ),
            ("--control empty", "empty has no config.json, so it is no checkpoint; name a…"),
            ("--teacher 'no model'", "no model does not exist; name a folder with config.json…"),
            ("--teacher empty", "empty has no config.json, so it is no checkpoint; name a…"),
        ),
        *bad(
            "evaluate",
            (
                "--against default --memory 100MB",
                "a .gguf is unpacked whole, and default takes 0.538 GB in float32, more than the "
                "0.1 GB of --memory; name the folder that it was made of, which is read block by "
                "block, or give more",
            ),
        ),
        *bad(
            ("bench", "chat"),
            (
                "--against file",
                "file is a file that is no .gguf; name a folder, a .gguf file or a hub id",
            ),
            ("--against empty", "empty has no config.json, so it is no checkpoint; name a…"),
        ),
    ],
    "Files of other programs": bad(
        "export",
        ("--to onnx", "--to onnx is unknown; use one of gguf"),
        ("--type q3", "--type q3 is unknown; use one of f32, f16, bf16, q8_0, q4_k_m"),
        ("--like file", "--like file is no GGUF file; name one of the model that it was made of"),
        ("--like no.gguf", "--like no.gguf is no GGUF file; name one of the model that it was…"),
        ("--out empty", "empty is a folder; --out names the file to write"),
        ("--out file", "file exists; give another --out, or --overwrite to replace it"),
        (
            "--out file --overwrite",
            "file is no GGUF file, so it is not replaced; give another --out",
        ),
        ("--out file --like file", "--like file is no GGUF file; name one of the model that it…"),
    ),
    "Tokens that stay": bad(
        "vocab",
        ("--size 0", "--size 0 leaves nothing; use 1 or more"),
        ("--documents 0", "--documents 0 leaves nothing; use 1 or more"),
        ("--text no.txt", "no.txt does not exist; check the path of the text file"),
        ("--out m --overwrite", "m is read by this command, so it is not replaced; give another…"),
    ),
    "Seeds": bad(
        WRITERS,
        *(
            (f"--seed {seed}", between("--seed", seed, 0, 2**32 - 1))
            for seed in (-1, 2**32, 2**63, 2**64, 10**30)
        ),
    ),
    "How much is removed, and where": [
        *bad(
            "prune",
            *((f"--ratio {share}", f"ratio={share} {SHARE}") for share in (0.0, 1.0, -0.5, "nan")),
            ("--memory lots", "--memory 'lots' is no size; write such as 8GB or 512MB"),
            ("--params 99T", "params=99,000,000,000,000 is not below the…"),
            ("--params 0", f"'0' {COUNT}"),
            ("--params many", f"'many' {COUNT}"),
            ("--unit-ratio 1.5", f"unit_ratio=1.5 {SHARE}"),
            ("--structures x", f"unknown structure 'x'; known are {STRUCTURES}"),
            (
                "--structures heads,fnn",
                f"unknown structure 'fnn'; did you mean ffn? known are {STRUCTURES}",
            ),
            (
                "--structures value_dim",
                "value_dim is not pruned by itself; choose head_dim, which it follows",
            ),
            ("--structures ''", f"no structures given; choose from {STRUCTURES}"),
            ("--structures heads,heads", "structure 'heads' is given twice; name it once"),
            ("--scope x", "--scope x is unknown; use one of local, global"),
            ("--round-to 0", "round_to=0 is not a multiple to round to; use 1 or more"),
            ("--round-to x", f"--round-to x {NO_MULTIPLE}"),
            ("--round-to tp0", f"--round-to tp0 {NO_MULTIPLE}"),
            (f"--round-to {10**12}", between("round_to", 10**12, 1, 2**20)),
            (
                "--protect-first -1",
                "protect_first=-1, protect_last=0: a number of layers cannot be negative",
            ),
            ("--layers heads=9-2", "layer range heads=9-2 runs backwards; swap its ends"),
            (
                "--layers heads:1-3",
                "'heads:1-3' is not a layer range; write such as heads=4-26,ffn=4-26",
            ),
            (
                "--scope global --spread 0.5",
                "spread=0.5 cannot reach the target; use 1 (all alike) or more",
            ),
            *(
                (
                    f"--spread 2 {other}",
                    "--spread 2 is for parameters that --scope global shares out, and does nothing "
                    f"with {alone}; change that, or leave it out",
                )
                for other, alone in (
                    ("--scope local", "--scope local"),
                    ("--preset paper", "--scope local"),
                    ("--uniform", "--uniform"),
                )
            ),
            ("--scope global --spread inf", between("spread", "inf", 1, 10**9)),
            (
                "--layer-trials --scope local",
                "--layer-trials share the budget out between layers, and with --scope local all "
                "lose the same share; leave it out, or change that",
            ),
            (
                "--layer-trials --scope global --samples 1",
                "--layer-trials are judged on text of their own, and --samples is 1; leave it out, "
                "or change that",
            ),
            ("--split heads=2", "share heads=2.0 is outside 0 to 1; give a part of 1"),
            ("--split heads:0.3", "'heads:0.3' is not a share; write such as heads=0.1,ffn=0.9"),
            ("--split heads=.3,heads=.7", "heads has two shares; give one"),
            (
                "--split heads=0.3",
                "no share is given for ffn; name every structure in the split",
            ),
            (
                "--split heads=0.3,ffn=0.3",
                "the shares of the split add up to 0.6; they must give 1",
            ),
            (
                "--split hidden=1,ffn=0,heads=0",
                "a share is given for hidden, which is not pruned; add it to the structures "
                "(heads, ffn) or drop the share",
            ),
            *(
                (
                    f"--{name.replace('_', '-')} 0.2 --split auto",
                    f"a split shares out parameters, and {name}=0.2 counts {counted}; drop one of "
                    "them",
                )
                for name, counted in (("kv_cache", "the cache"), ("unit_ratio", "units"))
            ),
            ("--steps 0", "steps 0 is outside 1 to 1000; give a number in between"),
            (f"--steps {10**9}", between("steps", 10**9, 1, 1000)),
            (
                "--preset file",
                "preset file holds no settings; write lines such as 'criterion: fisher'",
            ),
        ),
        *bad(
            ("prune", "compress"),
            (
                "--ratio 0.2 --params 1K",
                "--ratio and --params say different things; give one of them",
            ),
            (
                "--preset x",
                "no preset 'x'; known are balanced, best, fast, paper, or give a YAML file",
            ),
            (
                "--preset bets",
                "no preset 'bets'; did you mean best? known are balanced, best, fast, paper, or "
                "give a YAML file",
            ),
        ),
        *bad(
            "curve",
            (
                "--ratios 0.2,1",
                "--ratios 0.2,1.0: each is a share to remove, in (0, 1); give such as 0.1,0.2,0.3",
            ),
            ("--ratios x", "--ratios x is no list of shares; write such as 0.1,0.2,0.3"),
            ("--structures x", f"unknown structure 'x'; known are {STRUCTURES}"),
            *((f"--max-damage {damage}", f"--max-damage {damage} {DAMAGE}") for damage in LITTLE),
        ),
        *bad(
            "compress",
            (
                "--quantize int4",
                "--quantize int4 is unknown; did you mean int8? use one of none, int8",
            ),
            (
                "--quantize int8",
                "--quantize int8 needs the package torchao, which is not installed; run 'pip "
                "install torchao', or leave --quantize out",
            ),
            ("--ratio 1", f"ratio=1.0 {SHARE}"),
            ("--params x", f"'x' {COUNT}"),
            (
                "--vocab-size 400",
                "--vocab-size 400 does not say which tokens stay; name a text that has them with "
                "--vocab-text, or leave it out",
            ),
            ("--vocab-size 0 --vocab-text t.txt", between("--vocab-size", 0, 1, 10**9)),
            ("--time-budget 0", "--time-budget 0 is no time; write such as 90s, 30m or 2h"),
            (
                "--time-budget 99999h",
                "--time-budget 99999h is longer than a year; write such as 30m or 2h",
            ),
        ),
    ],
    "How importance is estimated": bad(
        "prune",
        ("--criterion x", f"--criterion x is unknown; use one of {', '.join(CRITERIA)}"),
        (
            "--criterion tailor",
            f"--criterion tailor is unknown; did you mean taylor? use one of {', '.join(CRITERIA)}",
        ),
        (
            "--criterion wanda --structures ffn,layers",
            "criterion 'wanda' reads the inputs of linear modules, which say nothing of whole "
            "layers; use random, l1, l2, taylor, fisher, fisher-obs, gate, or leave layers out of "
            "the structures",
        ),
        (
            "--criterion taylor --order x",
            "unknown order 'x': choose one of first, second, mixed",
        ),
        (
            "--criterion taylor --reduction x",
            "unknown reduction 'x': choose one of element, vector",
        ),
        (
            "--criterion l2 --aggregate x",
            "unknown aggregate 'x': choose one of sum, prod, max, last",
        ),
        (
            "--criterion fisher --order mixed",
            "--order mixed is for --criterion taylor, and does nothing with fisher; use "
            "--criterion taylor, or leave it out",
        ),
        (
            "--criterion l1 --reduction vector",
            "--reduction vector is for --criterion taylor, and does nothing with l1; use "
            "--criterion taylor, or leave it out",
        ),
        (
            "--criterion random --aggregate prod",
            "--aggregate prod is for --criterion taylor or l1 or l2, and does nothing with "
            "random; use --criterion taylor, or leave it out",
        ),
        (
            "--compensation x",
            "--compensation x is unknown; use one of none, least-squares",
        ),
        (
            "--repair-minutes 5 --samples 1",
            "--repair-minutes 5 is judged by a sample that it is not trained on, and there is 1; "
            "use --samples 2 or more",
        ),
        (
            "--compensation least-squares --refit-text 1 --samples 1",
            "--samples 1 leaves none to judge a refit by; use 2 or more, or --compensation none",
        ),
        (
            "--compensation least-squares --steps 2 --samples 1",
            "--samples 1 leaves none to judge a refit by; use 2 or more, or --compensation none",
        ),
        (
            "--compensation least-squares --calibration self --refit-text 3 --samples 1",
            "--samples 1 leaves none to judge a refit by; use 2 or more, or --compensation none",
        ),
        (
            "--repair-minutes 5 --device cuda:1",
            "--device cuda:1: training takes the first GPU that it sees; set "
            "CUDA_VISIBLE_DEVICES=1 and use --device cuda",
        ),
        ("--repair-minutes -1", between("--repair-minutes", -1, 0, 527040)),
        ("--refit-text 0", between("--refit-text", 0, 1, 100)),
        (
            "--preset fast --refit-text 2",
            "--refit-text 2 is for a refit, and there is none; use --compensation least-squares, "
            "or leave it out",
        ),
        ("--samples 0", "samples=0 calibrates on nothing; use at least 1"),
        (f"--samples {10**12}", between("samples", 10**12, 1, 10**9)),
        ("--score-samples 0", "score_samples=0 estimates on nothing; use at least 1"),
        (
            "--score-samples 999",
            "score_samples=999 of 128 samples cannot be read; ask for more samples, or for fewer "
            "of them",
        ),
        ("--seq-len 1", "seq_len=1 predicts no token; use at least 2"),
        (f"--seq-len {10**12}", between("seq_len", 10**12, 2, 2**24)),
        (
            "--calibration 'not a name'",
            "'not a name' is neither a local file nor a dataset name; use the path of a .txt, "
            ".jsonl, .json or .parquet file, a hub name, or one of wikitext2, ptb, c4, "
            "bookcorpus, wikipedia, code",
        ),
        (
            "--calibration t.txt:0.5,c4",
            "c4 has no share in t.txt:0.5,c4; give each source one, or none",
        ),
    ),
    "How much calibration text there is": [
        *bad(
            ("prune", "curve"),
            ("--samples 90 --seq-len 128", SHORT),
            (
                "--calibration t.txt,self --samples 200 --seq-len 128",
                "200 samples are 100 of t.txt: t.txt gives 9000 tokens; 100 samples of 128 tokens "
                "need 12800; use --samples 70 or a longer text",
            ),
        ),
        *bad(
            ("prune", "curve", "compress"),
            ("--calibration nofile.txt", NO_TEXT),
            (
                "--calibration chat",
                "source 'chat' is what the model writes by its chat template, and the tokenizer "
                "has none; use self, or a text",
            ),
        ),
    ],
    "Training": bad(
        "recover",
        ("--method x", "--method x is unknown; use one of blocks, full, lora"),
        (
            "--method qlora",
            "--method qlora is unknown; did you mean lora? use one of blocks, full, lora",
        ),
        (
            "--method full --keep-adapter",
            "method full has no adapter to keep; leave --keep-adapter out",
        ),
        (
            "--method blocks --lora-r 4",
            "--lora-r 4 is about adapters, and method blocks has none; leave it out, or use "
            "--method lora",
        ),
        ("--preset fast", "no preset 'fast'; known are paper, quick, or give a YAML file"),
        ("--schedule x", "--schedule x is unknown; use one of linear, cosine"),
        ("--template x", "--template x is unknown; use one of auto, chat, alpaca"),
        (
            "--report-to x",
            "--report-to x is unknown; use one of none, tensorboard, wandb, mlflow, trackio, "
            "comet_ml, clearml, swanlab",
        ),
        ("--trainer optim", "--trainer optim has no value; write it as NAME=VALUE"),
        *(
            (
                f"--trainer optim={name}",
                f"--trainer optim={name}: {name} steps in a way of its own, which the steps of "
                "recover do not follow; name another optim",
            )
            for name in (
                "lomo",
                "schedule_free_adamw",
                "galore_adamw_layerwise",
                "adamw_torch_8bit",
            )
        ),
        (
            "--trainer optin=x",
            "--trainer optin=x: TrainingArguments has no optin; did you mean optim? look at its "
            "page in transformers' documentation",
        ),
        *(
            (
                f"--trainer {name}=3",
                f"--trainer {name}=3: recover sets {name} itself; use its own option",
            )
            for name in ("max_steps", "warmup_steps", "num_train_epochs")
        ),
        (
            "--trainer 'lr_scheduler_kwargs={a'",
            "--trainer lr_scheduler_kwargs={a: {a is no YAML; close what it opens, or quote it",
        ),
        *(
            (
                f"--trainer {one}",
                f"--trainer {one}: recover lays out its own steps, in which "
                f"{one.partition('=')[0]} does nothing; leave it out",
            )
            for one in (
                "label_smoothing_factor=0.5",
                "save_steps=50",
                "auto_find_batch_size=true",
                "do_train=true",
                "bf16_full_eval=true",
            )
        ),
        (
            "--trainer 'lr_scheduler_kwargs={min_lr: 1e-6}'",
            "--trainer lr_scheduler_kwargs={min_lr: 1e-6} is for a schedule of the Trainer; name "
            "that with --trainer lr_scheduler_type=..., or use --schedule",
        ),
        (
            "--trainer lr_scheduler_type=greedy",
            "--trainer lr_scheduler_type=greedy follows scores that the Trainer takes, and recover "
            "takes its own; name another, or use --schedule",
        ),
        (
            "--trainer lr_scheduler_type=cosine --max-minutes 5",
            "--trainer lr_scheduler_type=cosine falls over a number of steps, which --max-minutes "
            "finds on the way; use --max-steps, or leave it out: --schedule follows the clock",
        ),
        (
            "--trainer adam_epsilon=tiny",
            "--trainer adam_epsilon=tiny: tiny is not a valid number; give one",
        ),
        (
            "--trainer gradient_checkpointing_kwargs=5",
            "--trainer gradient_checkpointing_kwargs=5: 5 is not a valid dictionary; give one",
        ),
        (
            "--trainer tf32=maybe",
            "--trainer tf32=maybe: maybe is not a valid boolean; give one",
        ),
        (
            "--trainer neftune_noise_alpha=-1",
            "--trainer neftune_noise_alpha=-1: noise is above 0; correct it, or leave it out",
        ),
        (
            "--trainer optim_target_modules=[q_proj]",
            "--trainer optim_target_modules=[q_proj] is for optimizers such as galore_adamw; name "
            "one with --trainer optim=..., or leave it out",
        ),
        (
            "--trainer optim=adamw_8bit",
            "--trainer optim=adamw_8bit needs the package bitsandbytes, which is not installed; "
            "run 'pip install bitsandbytes', or name another optim",
        ),
        ("--quantize x", "--quantize x is unknown; use one of none, int8, nf4"),
        (
            "--quantize int8 --method full",
            "--quantize int8 holds the weights that are not trained, and method full trains all of "
            "them; use --method lora",
        ),
        *(
            (
                f"--report-to {name}",
                f"--report-to {name} needs the package {name}, which is not installed; run 'pip "
                f"install {name}', or leave --report-to out",
            )
            for name in ("wandb", "tensorboard")
        ),
        ("--data nofile.txt", NO_TEXT),
        (
            "--device cuda:1",
            "--device cuda:1: training takes the first GPU that it sees; set "
            "CUDA_VISIBLE_DEVICES=1 and use --device cuda",
        ),
        (
            "--trainer lr_scheduler_type=constant --schedule linear",
            "--schedule linear and --trainer lr_scheduler_type both name a schedule; give one of "
            "them",
        ),
        ("--split test", "--split test is of hub datasets, and t.txt is none; leave it out"),
        (
            "--data chat",
            "source 'chat' is text that the model writes itself, for calibration only; give a text "
            "file or a dataset name here",
        ),
        (
            "--data self",
            "--data self is text that the dense model writes; name that model with --teacher",
        ),
        (
            "--data pruned",
            "--data pruned is text that the dense model judges; name that model with --teacher",
        ),
        (
            "--data pruned --teacher m",
            "--distill-weight 0.9 leaves the rest to a text that the pruned model wrote itself, "
            "which teaches it nothing; use 1 with --data pruned",
        ),
        (
            "--samples 1",
            "--samples 1 leaves nothing to train on or to judge by; use 2 or more",
        ),
        ("--held-out 0", "--held-out 0 leaves nothing to judge by; use at least 1"),
        *(
            (f"--{name} {value}", f"--{name} {float(value)} trains nothing; use a number above 0")
            for name in ("learning-rate", "epochs", "max-minutes", "lora-alpha")
            for value in ("0", "-1", "nan")
        ),
        ("--learning-rate 1e9", between("--learning-rate", "1e+09", 0, 1000)),
        ("--max-minutes 1e12", between("--max-minutes", "1e+12", 0, 527040)),
        ("--weight-decay -1", between("--weight-decay", "-1", 0, 10)),
        *(
            (f"--{name} {least - 1}", f"--{name} {least - 1} is too small; use {least} or more")
            for name, least in (
                ("batch-size", 1),
                ("seq-len", 2),
                ("lora-r", 1),
                ("max-steps", 1),
                ("evaluations", 1),
                ("patience", 1),
                ("save-every", 1),
            )
        ),
        ("--warmup-steps -1", "--warmup-steps -1 is too small; use 0 or more"),
        (f"--batch-size {10**12}", between("--batch-size", 10**12, 1, 2**20)),
        (f"--seq-len {10**12}", between("--seq-len", 10**12, 2, 2**24)),
        (f"--lora-r {10**9}", between("--lora-r", 10**9, 1, 2**16)),
        (f"--max-steps {10**15}", between("--max-steps", 10**15, 1, 10**9)),
        ("--lora-dropout 1", "--lora-dropout 1.0 is outside [0, 1); use such as 0.05"),
        ("--lora-dropout nan", "--lora-dropout nan is outside [0, 1); use such as 0.05"),
        ("--teacher m --temperature 0", "--temperature 0.0 is no temperature; use such as 2"),
        (
            "--teacher m --distill-weight 2",
            "--distill-weight 2.0 is outside [0, 1]; use such as 0.9",
        ),
        ("--teacher m --teacher-top-k 0", "--teacher-top-k 0 keeps nothing; use 1 or more"),
        *(
            (option, f"{option} is about a teacher; name that with --teacher, or leave it out")
            for option in ("--distill-weight 0.3", "--teacher-top-k 5")
        ),
        (
            "--teacher m --distill-weight 0",
            "--distill-weight 0 leaves the teacher nothing to do; add --data self, which it "
            "writes, or leave --teacher out",
        ),
        (
            "--teacher m --distill-weight 0 --data self --temperature 2",
            "--temperature is about what the teacher says, of which --distill-weight 0 hears "
            "nothing; leave one of them out",
        ),
        ("--perplexity-seq-len 1", between("--perplexity-seq-len", 1, 2, 2**24)),
        (
            "--perplexity-seq-len 64",
            "--perplexity-seq-len 64 is about texts that are measured; add --perplexity SRC or "
            "leave it out",
        ),
        ("--perplexity nofile.txt", NO_TEXT),
    ),
    "Measuring": [
        *bad(
            "evaluate",
            ("--protocol x", "--protocol x is unknown; use one of standard, paper"),
            (
                "--protocol papers",
                "--protocol papers is unknown; did you mean paper? use one of standard, paper",
            ),
            ("--seq-len 0", between("--seq-len", 0, 2, 2**24)),
            ("--max-tokens -1", between("--max-tokens", -1, 2, 10**9)),
            *(
                (
                    f"--batch-size {size}",
                    f"--batch-size {size} is no number of sequences; use 1 or more, or auto",
                )
                for size in ("0", "many")
            ),
            (f"--batch-size {10**12}", between("--batch-size", 10**12, 1, 2**20)),
            ("--prompt a --new-tokens 0", between("--new-tokens", 0, 1, 2**20)),
            *(
                (
                    f"--speed {one}",
                    f"{one.split()[0]} is about perplexity; add --perplexity SRC or leave it out",
                )
                for one in (
                    *("--protocol paper", "--seq-len 64", "--max-tokens 64"),
                    *("--split test", "--text-field body"),
                )
            ),
            *(
                (one, f"{said} is about prompts; add --prompt TEXT or leave it out")
                for one, said in (("--new-tokens 5", "--new-tokens"), ("--no-chat", "--chat"))
            ),
            (
                "--speed --batch-size 7",
                "--batch-size is about what is measured on text; add --perplexity SRC or leave it "
                "out",
            ),
            (
                "--no-cache",
                "--cache is about tasks and answers; add --tasks NAMES, --skills NAMES or --health "
                "or leave it out",
            ),
            ("--split test", "--split test is of hub datasets, and t.txt is none; leave it out"),
            (
                "--perplexity self",
                "source 'self' is text that the model writes itself, for calibration only; give a "
                "text file or a dataset name here",
            ),
            ("--tasks ''", "--tasks has an empty name; write such as boolq,piqa"),
            ("--tasks boolq,", "--tasks has an empty name; write such as boolq,piqa"),
            ("--tasks boolq,boolq", "task boolq is named twice; name it once"),
            (
                "--skills ''",
                "--skills has an empty or unknown name; use one or several of humaneval, gsm8k",
            ),
            (
                "--skills mmlu",
                "--skills has an empty or unknown name; use one or several of humaneval, gsm8k",
            ),
            (
                "--skills humaneval",
                "humaneval runs programs that the model writes; add --run-code if they may run "
                "here, with limits and without a network, or leave humaneval out",
            ),
            ("--run-code", "--run-code is about programs; add --skills humaneval or leave it out"),
            (
                "--skills-data d",
                "--skills-data is about skills; add --skills NAMES or leave it out",
            ),
            (
                "--skills gsm8k --skills-data nofolder",
                "nofolder is no folder; give the one that holds gsm8k.jsonl",
            ),
            (
                "--health-prompts t.txt",
                "--health-prompts is about long answers; add --health or leave it out",
            ),
            ("--health --health-prompts nofile.txt", NO_TEXT),
            ("--report m", "m has no report.json; name a folder that llm-pruner prune wrote"),
        ),
        *bad(
            ("evaluate", "compress"),
            ("--perplexity nofile.txt", NO_TEXT),
            ("--tasks boolq --limit 0", "limit=0 leaves no documents; use 1 or more"),
            (
                "--tasks boolq --tasks-data nofolder",
                "nofolder is no folder; give the one that holds boolq.jsonl",
            ),
            ("--limit 5", "--limit 5 is about tasks; add --tasks NAMES or leave it out"),
        ),
        *bad(
            "curve",
            ("--text nofile.txt", NO_TEXT),
            (
                "--text t.txt",
                "--text t.txt is the calibration text, which the models are fitted to; leave "
                "--text out to measure on the rest of it, or give another",
            ),
            ("--measured-tokens 1", between("--measured-tokens", 1, 2, 10**9)),
        ),
        *bad(
            "compress",
            ("--data nofile.txt", NO_TEXT),
            (
                "--no-recover --data self",
                "--data is about recovery; leave it or --no-recover out",
            ),
            (
                "--device cuda:1",
                "--device cuda:1: training takes the first GPU that it sees; set "
                "CUDA_VISIBLE_DEVICES=1 and use --device cuda",
            ),
        ),
        *bad(
            "bench",
            ("--prompt-tokens 0", between("prompt_tokens", 0, 1, 2**20)),
            ("--new-tokens -1", between("new_tokens", -1, 1, 2**20)),
            ("--batch-size 1,0", between("batch_size", 0, 1, 2**20)),
            ("--batch-size ''", "no batch size given; name one, such as 1"),
            ("--batch-size 1,x", "--batch-size 1,x is no list of numbers; use such as 1,8"),
        ),
        *bad(
            "chat",
            (
                "--against m",
                "--against m is the model itself; name another one, or leave it out",
            ),
            ("--new-tokens 0", between("--new-tokens", 0, 1, 2**20)),
            *(
                (
                    f"--temperature {value}",
                    f"--temperature {float(value)} is no temperature; use 0 or such as 0.7",
                )
                for value in ("-1", "nan", "inf")
            ),
            ("--seed -1", between("--seed", -1, 0, 2**32 - 1)),
        ),
        *bad(
            "compress",
            (
                "--data pruned",
                "--data pruned is for recover --distill-weight 1, which teaches by the dense model "
                "alone; use self, or prune first and then recover",
            ),
        ),
        *bad(
            ("prune", "curve", "vocab"),
            (
                "--text-split test",
                "--text-split test is of hub datasets, and t.txt is none; leave it out",
            ),
        ),
        *bad("inspect", ("--layer -1", "--layer -1 is no layer; layers count from 0")),
    ],
}

_HEAD = """\
# What is checked before work begins

Whatever the options alone can tell is checked before weights are read. Each refusal is one line on
standard error (`llm-pruner: ` and the message) and exit code 2, and nothing is written. From Python
the same checks raise `UserError`; a value in a `--config` file or a preset is refused in the same
words. Below, `m` is a checkpoint, `file` a file that is none and `empty` an empty folder; an
ellipsis stands for the rest of a message that depends on the machine.

The place of an output is tried: the nearest folder that is there has to take a new entry. `prune`,
`recover`, `compress` and `vocab` also compare the free space with the bytes of the weights,
estimated from the headers of the weight files, the share that is kept, and `--dtype`:

    smaller needs about 430.5 MB for weights, and the disk of /data has 12.0 MB free; free some, or
    give another --out

That is not asked of a model that is only now fetched from the hub; of a `.gguf` file, which packs
its weights, the estimate is the least that they can take. `prune` asks again once it is known what
stays, before anything is removed, and of a `--plan` then alone; and for the new weights that a
refit of a model read block by block keeps in the temporary folder until all is saved. What the
number or the width of a model's layers decides (`--protect-first 99`), a `--seq-len` beyond its
positions, and `--mask-prompt` of text without answers are found when the model is there. A word
where a number is needed is refused by the command line together with its usage.

`tests/support/bad_commands.py` makes this page, and tests check each line of it.
"""


def page() -> str:
    """Return the page."""
    lines = [_HEAD]
    for heading, rows in TABLE.items():
        lines += [f"## {heading}", "", "| command | given | said |", "| --- | --- | --- |"]
        for row in rows:
            cells = (", ".join(row.commands), f"`{row.shown}`", row.message)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def arguments(command: str, options: str) -> list[str]:
    """Return a command line: the good one, in which the options replace its own."""
    words, given = shlex.split(BASES[command]), shlex.split(options)
    for option in [word for word in given if word.startswith("--")]:
        for gone in {option, INSTEAD.get(option)}.intersection(words):
            at = words.index(gone)
            del words[at : at + 2]
    return words + given


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
