"""The command line: each command is a thin call into a module; heavy imports wait until they are needed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from harness import ranks

app = typer.Typer(
    name="retort",
    help="A bench for reasoning distillation: methods head to head, on equal budgets, with paired statistics.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(
    help="Look at the store of samples and verdicts, and prune it.", no_args_is_help=True
)
app.add_typer(cache_app, name="cache")
out = Console()

Suite = Annotated[str, typer.Argument(help="A YAML file, or the name of one in benchmarks/suites.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the suite, e.g. budget.steps=50."
    ),
]
Arms = Annotated[str | None, typer.Option(help="Only these arms, separated by commas.")]
Results = Annotated[Path, typer.Option(help="Folder that runs write to.")]
RESULTS = Path("results")


@app.command()
def compare(
    suite: Suite,
    methods: Arms = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds of each arm.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems of each benchmark.")] = None,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Each arm at the best setting of its sweep.")
    ] = False,
    set_: Set = None,
    results: Results = RESULTS,
    executor: Annotated[
        str, typer.Option(help="Where cells run: local (this machine), ray or slurm.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster, HOST:PORT or auto; default: one is started here."),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A parameter of SLURM's jobs as submitit names it, e.g. partition=gpu, timeout_min=600.",
        ),
    ] = None,
    gpus_per_cell: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of ray and slurm; default with ray: 1 if the cluster has any."),
    ] = None,
    cpus_per_cell: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of ray and slurm, and a cell's threads; default: the suite's threads, or cores over workers.",
        ),
    ] = None,
) -> None:
    """Train every method on every seed, evaluate, and print who is better. Resumes where it was cut."""
    from harness import executors, report
    from harness.compare import compare as run

    where = executors.choose(
        executor,
        ray_address=ray_address,
        slurm=slurm or (),
        gpus_per_cell=gpus_per_cell,
        cpus_per_cell=cpus_per_cell,
    )
    summary = run(
        suite,
        methods=_names(methods),
        seeds=seeds,
        limit=limit,
        tuned=tuned,
        overrides=set_ or (),
        results=results,
        executor=where,
    )
    if summary:
        folder = results / summary["name"]
        report.terminal(summary)
        out.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
        other = "" if results == RESULTS else f" --results {results}"
        out.print(f"Browse the runs in MLflow: retort ui{other}", highlight=False, soft_wrap=True)


@app.command()
def sweep(
    suite: Suite,
    method: Annotated[str | None, typer.Option(help="The arm to tune.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Tune every arm, with the same effort for each.")
    ] = False,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials of each arm, over all workers and calls.")
    ] = 40,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time; default: the suite's workers.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random, qmc or grid.")] = "tpe",
    pruner: Annotated[
        str,
        typer.Option(
            help="wilcoxon (on the outcome of each dev problem), median, halving or none."
        ),
    ] = "wilcoxon",
    storage: Annotated[
        str | None,
        typer.Option(
            help="A database for many machines, e.g. postgresql+psycopg://…; default: a journal file, results/NAME/study.log."
        ),
    ] = None,
    set_: Set = None,
    results: Results = RESULTS,
) -> None:
    """Tune an arm's hyperparameters on dev problems, and confirm the best on fresh seeds. Resumes where it was cut."""
    from harness.report import sweep as said
    from harness.sweep import sweep as run

    if (method is None) != every:
        raise ValueError("say which arm to tune with --method NAME, or tune all with --all")
    found = run(
        suite,
        method,
        trials=trials,
        workers=workers,
        sampler=sampler,
        pruner=pruner,
        storage=storage,
        overrides=set_ or (),
        results=results,
    )
    for study in found["studies"]:
        said.terminal(study)
    if len(found["studies"]) > 1:
        said.board(found)
    folder = results / found["name"]
    out.print(f"Report: {folder / 'sweep.html'}", highlight=False, soft_wrap=True)
    again = ["", *(f"--set {shlex.quote(each)}" for each in set_ or ())]
    again += [] if results == RESULTS else [f"--results {results}"]
    out.print(
        f"All arms at their best setting: retort compare {suite} --tuned{' '.join(again)}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a Hub id, micro/student, or a suite's line: '{server: URL, model: NAME}'."
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Benchmarks, separated by commas.")],
    n: Annotated[
        int | None, typer.Option(min=1, help="Samples a problem; default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems of each benchmark.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Default: the task's, or 0.6 for several samples of a greedy one."
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Default: the task's.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the task's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    engine: Annotated[str, typer.Option(help="What writes: hf or vllm.")] = "hf",
    aa: Annotated[
        bool,
        typer.Option("--aa", help="Draw it all again in other batches, and say what that moves."),
    ] = False,
    results: Results = RESULTS,
) -> None:
    """Score one model, trained here or anywhere, on benchmarks. Resumes where it was cut; a larger n adds samples."""
    import yaml

    from harness import evaluation, models, problems
    from harness.progress import Display
    from harness.report.reading import at_k, sampled

    given = {"n": n, "limit": limit, "temperature": temperature, "top_p": top_p}
    settings = {
        name: evaluation.several(name, {**given, "max_new_tokens": max_new_tokens})
        for name in _names(tasks) or ()
    }
    if not settings:
        raise ValueError(f"--tasks {tasks!r}: name at least one; retort benchmarks lists them")
    written = model.lstrip().startswith("{")
    if written and engine != "hf":
        raise ValueError("--engine goes with a checkpoint; in {…} write `engine: vllm`")
    try:
        spec = yaml.safe_load(model) if written else {"model": model, "engine": engine}
    except yaml.YAMLError as error:
        raise ValueError(
            f"{model}: not a line of a suite: {' '.join(str(error).split())}"
        ) from None
    loaded = models.load(spec, checkpoints=problems.checkpoints(), writes=True)
    with Display(len(settings)) as display:
        rows = evaluation.score(
            loaded,
            settings,
            seed=seed,
            cache=_store(results),
            progress=lambda phase, done, total: display(model, phase, done, total),
            folder=results,
        )
        moved = {}
        if aa:
            moved = evaluation.noise(
                loaded,
                settings,
                rows,
                seed=seed,
                progress=lambda phase, done, total: display(f"{model}, A/A", phase, done, total),
            )
    counts = {"n_problems": "problems", "truncated": "cut", "unparsed": "unparsed"}
    names = ("benchmark", "accuracy", "95 % interval", *counts.values(), "disputed")
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        low, high = row["ci95"]
        table.add_row(
            row["benchmark"],
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            *(str(row[count]) for count in counts),
            str(row.get("disputed", "–")),
        )
    out.print(table)
    for row in rows:
        name = row["benchmark"]
        out.print(f"{name}: {sampled(row['decoding'])}", highlight=False, soft_wrap=True)
        if "pass_at_k" in row:
            said = at_k({"maj_at_k": {}, **row})
            out.print(f"{name}: {said}", highlight=False, soft_wrap=True)
        out.print(f"{name}: samples in {row['file']}", highlight=False, soft_wrap=True)
        if one := moved.get(name):
            out.print(
                f"{name}: A/A, in other batches {one['texts']} of {one['samples']} texts and {one['verdicts']} verdicts "
                f"differ, accuracy {100 * one['delta']:+.2f} points",
                highlight=False,
                soft_wrap=True,
            )


@app.command()
def verify(
    task: Annotated[str, typer.Argument(help="One of our tasks: retort benchmarks lists them.")],
    file: Annotated[
        Path, typer.Argument(help='Lines {"id": …, "completion": …}; - reads standard input.')
    ],
    think_opened: Annotated[
        bool, typer.Option("--think-opened", help="The prompts ended inside a <think> already.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the data, e.g. release=v6."),
    ] = None,
) -> None:
    """Judge completions that exist already: a line {"id", "correct", "extracted", "status"} for each, in their order."""
    from contextlib import nullcontext

    from harness.progress import Display
    from harness.verify import run

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    stdin = str(file) == "-"
    with (
        nullcontext(sys.stdin.buffer) if stdin else file.open("rb") as lines,
        Display(1) as display,
    ):
        tally = run(
            task,
            lines,
            "standard input" if stdin else str(file),
            write,
            lambda done, total: display(task, "verdicts", done, total),
            opened=think_opened,
            options=_options(set_ or ()),
        )
    print(f"{task}: {tally}", file=sys.stderr)


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="Name of a comparison, or its folder.")],
    results: Results = RESULTS,
) -> None:
    """Write the report of a finished comparison again, and print its leaderboard."""
    import json

    from harness import report as reports

    folder = Path(name) if (Path(name) / "summary.json").is_file() else results / name
    if not (folder / "summary.json").is_file():
        from harness.config import nearest

        known = [path.parent.name for path in results.glob("*/summary.json")]
        raise ValueError(f"no finished comparison {name!r} in {results}: {nearest(name, known)}")
    files = reports.write(folder)
    reports.terminal(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    out.print("Written: " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)


@app.command()
def ui(
    port: Annotated[int | None, typer.Option(help="Default: a free one.")] = None,
    uri: Annotated[
        str | None,
        typer.Option(help="Tracking store; default MLFLOW_TRACKING_URI or results/mlflow.db."),
    ] = None,
    results: Results = RESULTS,
) -> None:
    """Start the MLflow UI and print its address."""
    import os

    from harness import tracking

    local = f"sqlite:///{results / 'mlflow.db'}"
    tracking.ui(uri or os.environ.get("MLFLOW_TRACKING_URI") or local, port)


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="NAME/LABEL/SEED, or the folder of the run.")],
    into: Annotated[
        Path | None, typer.Option(help="Default: results/NAME/reproduced/LABEL/SEED.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Take samples out of this store; default: a new one, all is drawn again."
        ),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            help="T1: bit for bit. T0: alike. Default: T1 if the environment is the same."
        ),
    ] = None,
    results: Results = RESULTS,
) -> None:
    """Run a trained cell again from its capsule and say where it first differs; exit status 1 if it is not what the tier promises."""
    from harness.reproduce import reproduce as again

    def say(line: str) -> None:
        out.print(line, markup=False, highlight=False, soft_wrap=True)

    outcome = again(run, results=results, into=into, store=store, tier=tier, say=say)
    for line in outcome.lines():
        say(line)
    if not outcome.equal:
        raise typer.Exit(1)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="Name of a comparison.")],
    output: Annotated[
        Path | None, typer.Option("--out", help="Default: NAME.retort.tar.gz, here.")
    ] = None,
    models: Annotated[bool, typer.Option("--models", help="With the trained students.")] = False,
    store: Annotated[
        bool, typer.Option("--store", help="With all samples of the teacher in the store.")
    ] = False,
    results: Results = RESULTS,
) -> None:
    """Pack a comparison, and its sweep, into one archive for another machine."""
    from harness.export import export as pack
    from harness.progress import Display, throttled

    with Display(1) as display:
        file = pack(
            name,
            results=results,
            out=output,
            models=models,
            store=_store(results).root if store else None,
            progress=throttled(lambda event: display(*event), name),
        )
    size = f"{file.stat().st_size / 2**20:.1f} MiB"
    lacks = [what for what, there in (("students", models), ("samples", store)) if not there]
    without = f", without {' and '.join(lacks)}" if lacks else ""
    out.print(f"Written: {file} ({size}{without})", highlight=False, soft_wrap=True)


@app.command("import")
def unpack(
    file: Annotated[Path, typer.Argument(help="An archive of retort export.")],
    results: Results = RESULTS,
) -> None:
    """Check an archive, unpack it under results/NAME, write its report again and mirror it to MLflow."""
    from harness.export import unpack as run
    from harness.progress import Display, throttled

    with Display(1) as display:
        folder = run(
            file,
            results=results,
            store=_store(results).root,
            progress=throttled(lambda event: display(*event), file.name),
        )
    out.print(f"Imported: {folder}", highlight=False, soft_wrap=True)


@app.command()
def sync(
    name: Annotated[
        str | None, typer.Argument(help="A comparison or sweep; default: all under results.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make the MLflow store again from the results.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Register the trained students too.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --rebuild on a server: delete our runs there.")
    ] = False,
    uri: Annotated[
        str | None,
        typer.Option(help="Tracking store; default MLFLOW_TRACKING_URI or results/mlflow.db."),
    ] = None,
    results: Results = RESULTS,
) -> None:
    """Record in MLflow what is not there yet, as after its server was down; what is there stays."""
    from harness import tracking

    if rebuild:
        if name is not None:
            raise ValueError(
                f"--rebuild makes the whole store again, not {name!r} alone: leave the name out"
            )
        done = tracking.rebuild(results, uri=uri, models=models, sure=yes)
    else:
        done = tracking.sync(results, name, uri=uri, models=models)
    out.print(f"Recorded in MLflow: {', '.join(done)}", highlight=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its card and fields.")] = None,
) -> None:
    """List the methods, or show one: what it is, its hyperparameters and their search ranges."""
    from harness import registry

    if name is None:
        table = Table("method", "paper", "needs", "what it does", box=None, pad_edge=False)
        for key, cls in registry.methods().items():
            needs = ", ".join(sorted(cls.needs))
            table.add_row(key, cls.paper, needs, registry.summary(cls))
        out.print(table)
        return
    cls = registry.get(name)
    out.print(Markdown(registry.card(cls)))
    table = Table("field", "default", "search or choices", "meaning", box=None, pad_edge=False)
    for field in registry.fields(cls):
        allowed = _range(field.search) or ", ".join(map(str, field.choices))
        texts = (_short(field.default), allowed, field.meaning)
        table.add_row(field.name, *map(escape, texts))  # a meaning may say [paper]
    out.print(table)


@app.command()
def benchmarks() -> None:
    """List the benchmarks and problem sets, and where their data comes from."""
    from harness import evaluation, problems

    table = Table("benchmark", "problems from", box=None, pad_edge=False)
    for name in sorted(evaluation.own()):
        table.add_row(name, problems.whereabouts(evaluation.source_of(name)))
    out.print(table)
    out.print(
        f"Problem sets for training: {', '.join(sorted(problems.sets()))}; or a JSONL file.",
        highlight=False,
    )
    out.print("Any other lm-eval task can be named in a suite too.", highlight=False)


@app.command()
def doctor(suite: Suite, set_: Set = None, results: Results = RESULTS) -> None:
    """Say what would go wrong, and what to do: tokenizers, templates, truncation, losses, memory, missing extras."""
    from harness import doctor as checks

    findings = checks.examine(suite, set_ or (), results)
    style = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for finding in findings:
        out.print(f"[{style[finding.level]}]{finding.level:>7}[/]  {finding.subject}: ", end="")
        out.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    suite: Suite,
    set_: Set = None,
    gpu: Annotated[
        str | None, typer.Option(help="Hours on this GPU, e.g. h100; default: on this machine.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0.0, help="Of an hour of one GPU, for the cost.")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Of a GPU's FLOP/s and bandwidth; default 0.35.")
    ] = None,
    probe: Annotated[
        int | None,
        typer.Option(
            min=1, help="Training problems looked at; default 256, of stand-ins 24 to 64."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a response, where the models are not here.")
    ] = None,
) -> None:
    """Say what a suite will cost before anything runs: tokens, FLOPs, memory, disk, hours, money."""
    from harness import plan as planning
    from harness.report import plan as said

    found = planning.forecast(
        suite,
        overrides=set_ or (),
        gpu=gpu,
        price=price,
        utilisation=planning.UTILISATION if utilisation is None else utilisation,
        num_problems=probe,
        tokens=tokens,
    )
    table = Table(*said.HEADER, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[:2]:
        column.no_wrap = True  # a row stays a line; the heads of the others wrap
    for row in said.rows(found):
        table.add_row(*map(escape, row))
    out.print(table)
    out.print()
    for line in said.sentences(found):
        out.print(f"{line}.", markup=False, highlight=False, soft_wrap=True)


@app.command()
def mechanisms(
    suite: Suite,
    methods: Arms = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Training problems looked at.")] = None,
    set_: Set = None,
    results: Results = RESULTS,
) -> None:
    """Score what each method decides against the problem set's oracle (the micro world); trains nothing."""
    from harness.compare import experiment
    from harness.mechanisms import scorecard
    from harness.report.reading import scorecard as lines

    setting = experiment(suite, set_ or ())
    card = scorecard(setting, methods=_names(methods), limit=limit, results=results)
    for label, rows in card["arms"].items():
        out.print(f"\n{label}", style="bold", markup=False, highlight=False)
        table = Table("measure", "value", "95 % interval", "cases", "problems", box=None)
        for line in lines(rows):
            table.add_row(*map(escape, line))
        out.print(table)
    path = results / setting.name / "mechanisms.json"
    out.print(f"\nWritten: {path}", highlight=False, soft_wrap=True)


@app.command()
def snr(
    suite: Suite,
    rollouts: Annotated[int, typer.Option(min=2, help="Student samples behind a pass rate.")] = 32,
    per_bin: Annotated[
        int, typer.Option(help="Problems of a bin, at most; a bin counts from 50 on.")
    ] = 200,
    references: Annotated[
        int, typer.Option(min=1, help="Teacher samples, of which the first correct one is used.")
    ] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Training problems looked at.")] = None,
    dimensions: Annotated[
        int, typer.Option(min=1, help="Numbers that a gradient is projected to.")
    ] = 8191,
    set_: Set = None,
    results: Results = RESULTS,
) -> None:
    """Measure the gradient's signal-to-noise against the student's pass rate, and fit PACED's exponents; trains nothing."""
    from harness.report import snr as said
    from harness.snr import measure

    found = measure(
        suite,
        rollouts=rollouts,
        per_bin=per_bin,
        references=references,
        dimensions=dimensions,
        limit=limit,
        overrides=set_ or (),
        results=results,
    )
    for name, loss in found["losses"].items():
        out.print(f"\n{name}", style="bold", markup=False, highlight=False)
        for header, rows in (
            (said.HEADER[:5], [row[:5] for row in said.table(loss)]),  # 100 columns
            (said.EXPONENTS, said.exponents(loss)),
            (said.KERNELS, said.kernels(loss)),
        ):
            table = Table(*header, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*map(escape, row))
            if rows:
                out.print(table)
        if exponents := said.fed_back(loss):
            out.print(exponents, highlight=False)
    out.print()
    for line in said.sentences(found):
        out.print(f"{line}.", markup=False, highlight=False, soft_wrap=True)
    folder = results / found["name"]
    out.print(
        f"Written: {folder / 'snr.json'}, {folder / 'snr.html'}", highlight=False, soft_wrap=True
    )


@cache_app.command("show")
def cache_show(results: Results = RESULTS) -> None:
    """What the store holds."""
    table = Table("kind", "what", "rows", "MiB", "last used", box=None, pad_edge=False)
    for entry in _store(results).show():
        settings = ", ".join(f"{k} {v}" for k, v in entry.group.get("sampling", {}).items() if v)
        what = f"{str(entry.group.get('model', ''))[:12]} {settings}".strip()
        when = f"{datetime.fromtimestamp(entry.last_used):%Y-%m-%d %H:%M}"
        damaged = f" ({entry.damaged} damaged files)" if entry.damaged else ""
        size = f"{entry.bytes / 2**20:.1f}"
        table.add_row(entry.kind, what + damaged, str(entry.rows), size, when)
    out.print(table)


@cache_app.command("prune")
def cache_prune(
    kind: Annotated[str | None, typer.Option(help="Only this kind, e.g. samples.")] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Only what was not used for this many days.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole store.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    results: Results = RESULTS,
) -> None:
    """Remove from the store; what a later run needs again is computed again."""
    if not (kind or older_than or everything):
        raise ValueError("say what to remove: --kind samples, --older-than 30, or --all")
    freed = _store(results).prune(kind=kind, older_than_days=older_than, dry_run=dry_run)
    out.print(f"{'Would free' if dry_run else 'Freed'} {freed / 2**20:.1f} MiB", highlight=False)


def _store(results: Path) -> Any:
    import os

    from harness.store import Store

    return Store(Path(os.environ.get("RETORT_STORE", results / "store")))


def _options(given: Sequence[str]) -> dict[str, str]:
    for each in given:
        if "=" not in each:
            raise ValueError(f"--set {each!r}: write KEY=VALUE, for example release=v6")
    return dict(each.split("=", 1) for each in given)


def _names(arms: str | None) -> list[str] | None:
    return None if arms is None else [name.strip() for name in arms.split(",") if name.strip()]


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 28 else text[:27] + "…"


def _range(space: Any) -> str:
    if not space:
        return ""
    if "choices" in space:
        return ", ".join(map(str, space["choices"]))
    return f"{space['low']:g} to {space['high']:g}" + (", log" if space["log"] else "")


def main() -> None:
    """A user's mistake is one clear line and exit status 2; a bug keeps its traceback."""
    try:
        if ranks.world() > 1:
            if sys.argv[1:2] != ["compare"]:
                raise ValueError(
                    "accelerate launch: only `compare` runs on several ranks; take `retort` for this command"
                )
            ranks.join()
        app()
    except (ValueError, OSError) as error:
        text = (
            f"{error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        if ranks.speaks():
            print(f"retort: {text}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # Typer's word for Ctrl-C
            raise
        print(
            "retort: stopped; what was finished is kept, run the same command to go on",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
