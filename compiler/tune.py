"""Find the best values of the kernels' knobs on this machine, or on others behind RPC.

    python -m compiler.tune                                      the shipped model, this CPU
    python -m compiler.tune --model bitnet-b1.58-2b-4t --variant a4.8 --trials 240
    python -m compiler.tune --resume                             go on where Ctrl-C stopped it
    python -m compiler.tune --report --output report/            what tuning gained: table, plot
    python -m compiler.tune --target arm-pi4 --rpc 127.0.0.1:9190 --key pi4

A model's shapes are enough: --model takes a known configuration too, or a directory with only a
config.json. `compiler.build` finds the records by itself. Exit code 2: it cannot be tuned, for the
reason in the one line on stderr; 130: interrupted, what was measured is kept, of a report nothing.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import refuse
from compiler.config import BuildError
from compiler.tuning.options import TuneConfig, check, parse

if TYPE_CHECKING:
    from compiler.tuning.machine import Machine
    from compiler.tuning.pool import Rpc, Worker
    from compiler.tuning.tasks import Task
    from model.config import ModelConfig
    from schedules.targets import TargetSpec

LOOPBACK = "127.0.0.1"


def find_config(config: TuneConfig, target: "TargetSpec") -> "ModelConfig":
    """The model as a build for the target has it."""
    from compiler import head_bits

    found = find_shapes(config)
    return found.replace(head_bits=head_bits.choose(None, found, target))


def find_shapes(config: TuneConfig) -> "ModelConfig":
    """A shipped model's, a known configuration's, or a directory's."""
    from model.checkpoint import ZOO, zoo_models
    from model.config import MODELS, VARIANTS, ModelConfig

    for directory in (ZOO / config.model, Path(config.model)):
        if (directory / "config.json").is_file():
            found = ModelConfig.load(directory)
            break
    else:
        if config.model not in MODELS:
            raise BuildError(
                f"model: asked for {config.model!r}; possible: {', '.join(zoo_models())}, shapes "
                f"alone of {', '.join(MODELS)}, or a directory with config.json"
            )
        found = MODELS[config.model]
    if config.variant is None:
        return found
    if config.variant not in VARIANTS:
        raise BuildError(f"variant: asked for {config.variant!r}; possible: {', '.join(VARIANTS)}")
    return found.with_variant(config.variant)


def find_target(name: str) -> "TargetSpec":
    from schedules import targets

    try:
        return targets.find(name)
    except ValueError as error:
        raise BuildError(str(error)) from error


def parse_rpc(config: TuneConfig) -> "Rpc | None":
    from compiler.tuning.pool import Rpc

    if config.rpc is None:
        return None
    host, _, port = config.rpc.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise BuildError(
            f"rpc: asked for {config.rpc!r}; possible: HOST:PORT of a tracker, or its PORT on the "
            "loopback"
        )
    assert config.key
    return Rpc(host or LOOPBACK, int(port), config.key)


def require_runnable(asked: str, target: "TargetSpec", rpc: "Rpc | None") -> None:
    from schedules.targets import TARGETS, compute_capability

    if asked == "cuda" and compute_capability() is None:
        rows = "|".join(name for name in TARGETS if name.startswith("cuda-sm"))
        raise BuildError(
            "target: asked for cuda, but tuning runs the kernels and no GPU is here; possible: "
            f"on the GPU's own host, or --rpc HOST:PORT --key KEY with --target {rows}"
        )
    if rpc is None and not target.runs_here():
        raise BuildError(
            f"target: {target.name} does not run on this host; "
            "possible: --rpc HOST:PORT --key KEY of a machine that it runs on"
        )


def choose_tasks(config: TuneConfig, model: "ModelConfig", target: "TargetSpec") -> "list[Task]":
    from compiler.tuning.tasks import extract

    tasks = extract(model, target)
    names = list(dict.fromkeys(task.op.name for task in tasks))
    if unknown := [op for op in config.ops if op not in names]:
        raise BuildError(
            f"ops: asked for {', '.join(unknown)}; possible for {model.name} on {target.name}: "
            f"{', '.join(names) or 'none: no kernel leaves anything open'}"
        )
    chosen = [task for task in tasks if not config.ops or task.op.name in config.ops]
    if not chosen:
        raise BuildError(f"tune: no kernel of {model.name} leaves anything open on {target.name}")
    return chosen


@dataclass(frozen=True)
class Site:
    """Where candidates are built and run, and what is known of the place."""

    target: "TargetSpec"
    linker: str
    workers: "list[Worker]"
    machine: "Machine"
    cold_bytes: int


def open_site(config: TuneConfig, stack: ExitStack) -> Site:
    """Everything about the place that can be refused is, before the first measurement."""
    target, rpc = find_target(config.target), parse_rpc(config)
    require_runnable(config.target, target, rpc)

    from compiler import toolchain
    from compiler.tuning import machine
    from compiler.tuning.pool import Worker, count_servers

    linker = toolchain.find_linker(target)
    toolchain.require_device_compiler(target)
    cpus = machine.usable_cpus()
    threads = config.threads or cpus
    if rpc is None and threads > cpus:
        raise BuildError(f"threads: asked for {threads}; possible: 1 to {cpus} here")
    workers = [Worker(target, threads, rpc) for _ in range(count_servers(rpc))]
    for worker in workers:
        stack.callback(worker.close)
    if rpc:
        where, cold = machine.remote_machine(rpc.key, threads), machine.LLC_BYTES_UNKNOWN
    else:
        where = machine.this_machine(target, threads)
        cold = machine.last_level_cache_bytes() * 3 // 2
    if config.cold_mib is not None:
        cold = config.cold_mib * 2**20
    return Site(target, linker, workers, where, cold)


def tune(config: TuneConfig) -> Path:
    """Tune, with a table on stderr; returns the directory of the records."""
    with ExitStack() as stack:
        site = open_site(config, stack)

        from compiler.tuning.disk import held
        from compiler.tuning.live import showing
        from compiler.tuning.lookup import user_root
        from compiler.tuning.session import Session, Settings
        from compiler.tuning.store import Writer

        tasks = choose_tasks(config, find_config(config, site.target), site.target)
        path = (config.records or user_root()) / site.target.name / site.machine.slug
        stack.enter_context(held(path))
        writer = Writer(config.records or user_root(), site.target.name, site.machine)
        if writer.problems:
            print(f"records: {writer.problems}", file=sys.stderr)
        settings = Settings(
            config.trials,
            config.weigh,
            site.cold_bytes,
            site.linker,
            config.resume,
            config.minutes,
        )
        session = Session(tasks, site.workers, writer, settings)
        if config.resume and not session.takes_up:
            print(f"resume: no records in {writer.path}; begins anew", file=sys.stderr)
        session.say = stack.enter_context(showing(session))
        try:
            session.run()
        finally:
            for line in session.lost:
                print(f"{line}; left out, the others went on", file=sys.stderr)
        return writer.path


def report(config: TuneConfig) -> Path:
    """Measure default and tuned side by side; returns the file of the tables."""
    with ExitStack() as stack:
        site = open_site(config, stack)

        from compiler.tuning import page
        from compiler.tuning import report as reports
        from compiler.tuning.lookup import Lookup, default_roots

        def say(line: str) -> None:
            print(line, file=sys.stderr)

        model = find_config(config, site.target)
        tasks = choose_tasks(config, model, site.target)
        roots = ((config.records,) if config.records else ()) + default_roots()
        lookup = Lookup(site.target, roots, site.machine)
        for note in lookup.notes:
            say(f"records: {note}")
        measuring = reports.Measuring(
            site.workers[0], site.linker, site.cold_bytes, config.weigh, lookup
        )
        rows = list(reports.measure(tasks, measuring, say))
        benched = None
        if has_weights(config) and config.rpc is None:
            records = str(config.records) if config.records else None
            threads = site.machine.threads
            benched = reports.bench(config.model, site.target.name, threads, records, say)
        title = f"{model.name} ({model.variant}), {site.target.name}, {site.machine.processor}"
        title += f", {site.machine.threads} threads, TVM {site.machine.tvm}"
        return page.write(config.report_directory, title, rows, config.weigh, benched)


def has_weights(config: TuneConfig) -> bool:
    """Whether compiler.build can build exactly this model."""
    from model import checkpoint

    if config.variant is not None:
        return False
    try:
        checkpoint.IntegerWeights(checkpoint.find(config.model))
    except checkpoint.CheckpointError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    from compiler.build import watch_interrupts

    config = parse(argv, (__doc__ or "").split("\n")[0])
    interrupted = watch_interrupts()
    try:
        check(config)
        if config.report:
            print(f"report   {report(config)}")
        else:
            print(f"records  {tune(config)}")
    except BaseException as error:
        if interrupted:  # whatever TVM made of the KeyboardInterrupt
            kept = "what is measured is kept, --resume goes on"
            if config.report:
                kept = "no report is written, the records are as they were"
            print(f"compiler.tune: interrupted; {kept}", file=sys.stderr)
            return 130
        if isinstance(error, OSError):
            return refuse("compiler.tune", f"{error.filename or 'tune'}: {error.strerror or error}")
        if isinstance(error, ValueError):  # BuildError, CheckpointError, ConfigError
            return refuse("compiler.tune", error)
        if isinstance(error, ImportError):
            return refuse(
                "compiler.tune", f"{error}; possible: pip install 'bitnet-compiler[export,tune]'"
            )
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
