"""Options: what is asked of compiler.tune, and what is refused before anything is imported."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from command_line import Parser
from compiler.config import DEFAULT_MODEL, BuildError

TRIALS = 200
MINUTES = 20.0
REPORT = Path("tune-report")
WEIGH = ("both", "decode", "prefill")


@dataclass(frozen=True)
class TuneConfig:
    """What is asked of one run."""

    model: str = DEFAULT_MODEL
    variant: str | None = None
    target: str = "native"
    trials: int = TRIALS
    minutes: float = MINUTES
    ops: tuple[str, ...] = ()
    weigh: str = "both"
    records: Path | None = None
    threads: int | None = None
    rpc: str | None = None
    key: str | None = None
    cold_mib: int | None = None
    resume: bool = False
    report: bool = False
    output: Path | None = None

    @property
    def report_directory(self) -> Path:
        return self.output or REPORT


def parse(argv: list[str] | None, description: str) -> TuneConfig:
    parser = Parser(prog="python -m compiler.tune", description=description)
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|DIR",
        help="a shipped model, a known configuration or a directory with config.json "
        "(default: %(default)s)",
    )
    add("--variant", metavar="VARIANT", help="tune the shapes as a4.8, b1.58 or llama")
    add(
        "--target",
        default="native",
        metavar="TARGET",
        help="a row of schedules/targets.py, or native, the best one for this CPU (the default)",
    )
    add("--trials", type=int, default=TRIALS, help="candidates in all (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=MINUTES,
        help="after which no new candidates are tried (default: %(default)s)",
    )
    add("--ops", nargs="+", default=(), metavar="OP", help="only these ops (default: all)")
    add_what_counts(parser)
    add_where(parser)
    add("--resume", action="store_true", help="take up the records that are there")
    add("--report", action="store_true", help="measure what tuning gained; table and plot")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"of --report (default: {REPORT})",
    )
    values = vars(parser.parse_args(argv))
    return TuneConfig(**values | {"ops": tuple(values["ops"])})


def add_what_counts(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--weigh",
        default="both",
        choices=WEIGH,
        help="what counts: a decode step, a prompt of 128 tokens, or a prompt and 128 steps "
        "(the default)",
    )


def add_where(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--records",
        type=Path,
        metavar="DIR",
        help="where records are kept (default: this user's, which compiler.build reads)",
    )
    add("--threads", type=int, help="of a kernel (default: all CPUs that may be used)")
    add(
        "--rpc",
        metavar="[HOST:]PORT",
        help="an RPC tracker, on the loopback unless HOST is given; measure on the servers of "
        "--key. Servers run what anyone sends: docs/architecture.md, 'Tuning other machines'",
    )
    add("--key", help="the servers' key at the tracker")
    add(
        "--cold-mib",
        type=int,
        metavar="MIB",
        help="copies of the weights in turn (default: the last-level cache and a half)",
    )


def check(config: TuneConfig) -> None:
    """What can be refused before anything is imported."""
    if not config.minutes > 0:
        raise BuildError(f"minutes: asked for {config.minutes:g}; possible: above 0")
    counts = {"trials": config.trials, "threads": config.threads, "cold-mib": config.cold_mib}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise BuildError(f"{name}: asked for {value}; possible: 1 and more")
    if (config.rpc is None) != (config.key is None):
        raise BuildError("rpc: --rpc HOST:PORT and --key KEY go together; possible: both, or none")
    if config.report:
        check_report(config)
    elif config.output is not None:
        raise BuildError(
            f"output: asked for {config.output} without --report; possible: --report --output DIR, "
            "or --records DIR for the records"
        )


def check_report(config: TuneConfig) -> None:
    """What would be found out only after everything is measured."""
    if config.records is not None and not config.records.is_dir():
        raise BuildError(f"records: asked for {config.records}; possible: a directory of records")
    place = config.report_directory.absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise BuildError(
            f"output: asked for {config.report_directory}, cannot write to {place}; possible: "
            "--output DIR"
        )
    if find_spec("matplotlib") is None:
        raise BuildError(
            "report: found no matplotlib for its plot; possible: pip install "
            "'bitnet-compiler[export,tune]'"
        )
