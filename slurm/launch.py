#!/usr/bin/env python3
"""Start a run, here or on Slurm, and look after it.

  python slurm/launch.py --scale digits               the whole road on real digits, in minutes, here
  python slurm/launch.py --scale huge --data IMAGENET --teacher huge.pth --vae kl16.ckpt --out RUN
                                                      ImageNet on 8 GPUs: one Slurm job per stage, in turn
  python slurm/launch.py --scale huge --dry-run       plan, memory, days, and the scripts for sbatch; nothing
                                                      is started or written
  python slurm/launch.py ... --nodes 4 --partition a100 --account me --time 1-00:00:00
      --setup "module load cuda" --sbatch exclusive mail-user=me@home
  python slurm/launch.py --scale digits --stage distill
                                                      one stage, from what the run folder holds
  python slurm/launch.py --scale digits --set sampling.cfg=2 rl.anchor=0 --out runs/cfg2
  python slurm/launch.py --scale digits --redo rl --set rl.lr=5e-5
                                                      start a stage over, with other settings

  python slurm/launch.py status RUN                   how far each stage is, and what Slurm says of its job
  python slurm/launch.py logs RUN [--stage S] [--lines N] [--follow]
  python slurm/launch.py cancel RUN                   take back the jobs that wait or run

The same command again goes on where the last one ended: finished stages are skipped, an interrupted one is
resumed. Ctrl-C stops after the current step, a second Ctrl-C at once. A job that Slurm takes away saves
itself, is queued again and goes on. What is not said here, sbatch reads from SBATCH_PARTITION,
SBATCH_ACCOUNT, SBATCH_QOS and the like.
"""
import argparse
import contextlib
import io
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

from marval import book, job as jobs, launch, pipeline
from marval.border import Parser, Range, Text, checked, entry_point, given, one_line
from marval.capacity import check_disk
from marval.config import SCALES, BadInput, override, preset
from marval.files import ensure_folder

GRACE = 60      # seconds that a local job has to finish its step and save, before it is killed
ALONE = 10      # seconds that other processes have to end once one has failed
FILES = dict(data="data.path", vae="data.vae", names="data.names", teacher="teacher.checkpoint",
             reward="rl.reward_weights")
NAMES = ("partition", "account", "qos", "constraint")
ASKED = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem", "time", *NAMES, "setup",
         "sbatch")
LOCALLY = ("nodes", "gpus_per_node", "tasks_per_node", "setup")  # what a run on this machine understands


# ---- what was typed

def arguments(argv):
    "The command line of a start."
    p = Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    add = p.add_argument
    add("--scale", required=True, help=" | ".join(SCALES))
    add("--stage", default="all", help=" | ".join((*pipeline.STAGES, "all")) + " (default: all)")
    add("--cluster", default="auto", help="auto | slurm | local; auto = Slurm where there is an sbatch and a "
        "controller answers (default: auto)")
    add("--out", metavar="DIR", help="run folder (default: runs/SCALE); on Slurm, where all nodes see it")
    add("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--redo", metavar="STAGE", help="remove what this stage, and those that depend on it, have made in "
        "the run folder; then start")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="other values for single fields, as in distill.lr=1e-4")
    add("--debug", action="store_true", help="show the traceback of an unexpected error")
    add_files(p.add_argument_group("files, for all scales but digits and smoke").add_argument)
    add_requests(p.add_argument_group("what each job asks for").add_argument)
    args = p.parse_args(argv)
    for name, value in vars(args).items(): printable(name, value)
    return args


def add_files(add):
    add("--data", metavar="DIR", help="images, DIR/CLASS/IMAGE")
    add("--vae", metavar="FILE", help="weights of the tokenizer, MAR's kl16.ckpt")
    add("--teacher", metavar="FILE", help="a trained teacher, MAR's public checkpoint or ours; without it, "
        "one is trained")
    add("--reward", metavar="FILE", help="weights of the reward, such as PickScore's; of a sum, "
        "NAME=FILE,NAME=FILE (default: from Hugging Face's cache)")
    add("--names", metavar="FILE", help="JSON {class folder: name}, for prompts (default: ImageNet's names)")


def add_requests(add):
    add("--nodes", type=int, metavar="N", help="machines (default: 1)")
    add("--gpus-per-node", type=int, metavar="N",
        help="GPUs on each, one process a GPU (default: 8; digits, smoke, tiny: 0)")
    add("--tasks-per-node", type=int, metavar="N",
        help="processes on each, for runs without GPUs (default: 1)")
    add("--cpus-per-task", type=int, metavar="N", help="CPU cores a process")
    add("--mem", metavar="SIZE", help="memory of a node, as in 480G; 0 = all")
    add("--time", metavar="TIME",
        help="minutes, HH:MM:SS or D-HH:MM:SS; a job that needs longer is queued again")
    for name in NAMES: add(f"--{name}", metavar="NAME", help="as for sbatch")
    add("--setup", nargs="+", action="extend", default=[], metavar="CMD",
        help="shell commands before Python starts, each in quotes")
    add("--sbatch", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any other option of sbatch, as in gres=gpu:a100:8")


def printable(name, value):
    "Texts of the command line hold no control characters, and nothing that is no Unicode."
    if name in ("setup", "sbatch"): return          # `resources` looks at them
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str): checked(Text, text, f"--{name.replace('_', '-')}")


def typed_path(option: str, text: str) -> Path:
    "A path as typed, with `~` for a home. Raises `BadInput` for an empty one, and for a home of nobody."
    if not text: raise BadInput(f"{option} '': expected a path")
    try: return Path(text).expanduser()
    except RuntimeError: raise BadInput(f"{option} {given(text)}: no such user; expected a path") from None


def run_folder(text: str) -> Path:
    "Where a run lives."
    out = typed_path("--out", text)
    if out.absolute() == Path("/"): raise BadInput(f"--out {given(text)}: expected a folder of its own")
    return out


def configuration(args):
    "Preset, files and single values."
    cfg = preset(args.scale, args.seed)
    named = {name: text for name in FILES if (text := getattr(args, name)) is not None}
    if named and cfg.data.name == "digits":
        raise BadInput(f"--{next(iter(named))}: scale {args.scale} brings all it needs; expected another "
                       "scale, or no such option")
    files = [f"{FILES[name]}={absolute(name, text)}" for name, text in named.items()]
    return override(cfg, [*files, *args.set])


def absolute(name, text):
    "The absolute path of a file, or of several."
    if name != "reward": return typed_path(f"--{name}", text).absolute()
    from marval.reward_sums import absolute_files
    if not text: raise BadInput("--reward '': expected a path")
    try: return absolute_files(text)
    except RuntimeError: raise BadInput(f"--reward {given(text)}: no such user; expected a path") from None


# ---- where it runs

def pick_cluster(wish: str, dry_run: bool) -> str:
    "`slurm` or `local`."
    if wish not in ("auto", "slurm", "local"):
        raise BadInput(f"--cluster {given(wish)}: expected auto, slurm or local")
    if wish == "local" or dry_run and wish == "slurm": return wish
    if wish == "auto" and not book.slurm_answers(): return "local"
    missing = [tool for tool in ("sbatch", "srun") if not shutil.which(tool)]
    if missing:
        raise BadInput(f"--cluster slurm: no {missing[0]} on PATH; expected a Slurm login node, or --cluster "
                       "local")
    if wish == "slurm" and not book.slurm_answers():
        raise BadInput("--cluster slurm: sbatch is here, but no Slurm controller answers (sinfo fails); "
                       "expected a Slurm login node, or --cluster local")
    return "slurm"


def fit_here(r, scale: str):
    "What a run asks for, on this machine. Raises `BadInput` where it hasn't got that."
    if stray := [k for k in r.given if k not in LOCALLY]:
        raise BadInput(f"--{stray[0].replace('_', '-')}: an option of Slurm jobs, and this run is one of "
                       "this machine (--cluster local, or no Slurm controller answers)")
    if r.nodes > 1: raise BadInput(f"--nodes {r.nodes}: a run on this machine has one; expected 1, or Slurm")
    if not r.gpus_per_node: return r
    import torch
    found = torch.cuda.device_count()
    if "gpus_per_node" not in r.given and found:
        return launch.resources(scale, dict(gpus_per_node=found, setup=list(r.setup)))
    if r.gpus_per_node > found:
        raise BadInput(f"scale {scale} asks for {r.gpus_per_node} GPUs, and this machine has {found}; "
                       f"expected Slurm, or --gpus-per-node 0 to {found}")
    return r


# ---- on this machine

class Tail:
    "Shows what is appended to a file, byte by byte, so that a progress bar looks as in its own terminal."
    def __init__(self, path, show, at=0): self.path, self.show, self.at, self.last = path, show, at, b"\n"

    def __call__(self):
        if not self.path.is_file(): return
        with open(self.path, "rb") as f:
            f.seek(self.at)
            if new := f.read():
                self.at, self.last = self.at + len(new), new[-1:]
                self.show(new)


def raw(stream):
    "Shows bytes as they are."
    def show(new):
        stream.buffer.write(new)
        stream.buffer.flush()
    return show


def plain(new):
    "Shows bytes that may be a stranger's: nothing in them steers the terminal."
    print(book.printable(new.decode(errors="replace")), end="", flush=True)


class Stop:
    "Counts the requests to stop."
    def __init__(self):
        self.count = 0
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(s) is not signal.SIG_IGN: signal.signal(s, self)

    def __call__(self, *_): self.count += 1


def python_after(setup, folder) -> str:
    "The command that starts Python in a local job: `--setup` first, in a shell whose errors go to the log."
    if not setup: return shlex.quote(sys.executable)
    shell, lines = shutil.which("bash") or "/bin/sh", ["exec </dev/null"]
    for command in setup:
        said = shlex.quote(f"error: --setup {given(command)} ended with status")
        lines.append(f"eval {shlex.quote(command)} || {{ s=$?; echo {said} $s >&2; exit $s; }}")
    lines.append(f'exec {shlex.quote(sys.executable)} "$@"')
    (folder / "setup.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{shell} {shlex.quote(str(folder / 'setup.sh'))}"


def executor_here(r, folder):
    "submitit's, for this machine."
    import submitit
    os.environ["SUBMITIT_LOG_LEVEL"] = "CRITICAL"
    if sys.stderr.isatty(): os.environ["COLUMNS"] = str(shutil.get_terminal_size().columns)
    else: os.environ.pop("COLUMNS", None)               # nobody watches: a line now and then will do
    executor = submitit.LocalExecutor(folder=folder, python=python_after(r.setup, folder))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [int(i) for i in visible if i.isascii() and i.isdigit()][:r.gpus_per_node]
    more = {"visible_gpus": visible} if visible else {}
    executor.update_parameters(timeout_min=60 * 24 * 3650, tasks_per_node=r.tasks_per_node,
                               gpus_per_node=r.gpus_per_node, **more)
    return executor


def submit_here(cfg, stages, out, r):
    """Start the one local job, and note it. It inherits an ignored SIGINT: Ctrl-C is this process's to
    answer, submitit's controller would kill the job a second later."""
    with contextlib.closing(pipeline.lock(out)), noting(out), new_folder(out) as folder:
        port = launch.free_port() if r.tasks_per_node > 1 else 0
        work = jobs.Job(cfg, stages, out, r.gpus_per_node, launcher=os.getpid(), port=port)
        executor, before = executor_here(r, folder), signal.signal(signal.SIGINT, signal.SIG_IGN)
        try: job = executor.submit(work)
        finally: signal.signal(signal.SIGINT, before)
        try: book.note(out, cfg, [entry(job, "local", stages, folder)])
        except BaseException:
            job._process.kill()
            raise
        return job


@contextlib.contextmanager
def noting(out):
    "A start needs no old book: one that can't be read is set aside. A refused one leaves it as it was."
    repair(out)
    with book.undone(out): yield


def repair(out):
    "Set a book aside that can't be read, and say so."
    if wrong := book.repair(out): print(f"warning: {wrong}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def new_folder(out):
    "A folder for the jobs of this launch. A launch that fails leaves none."
    folder = book.new_folder(out)
    try: yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def entry(job, cluster, stages, folder):
    "What the book says of a job."
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    return book.JobEntry(str(job.job_id), cluster, tuple(stages), folder.name, when)


def local(cfg, stages, out, r, again: str) -> int:
    "Run everything in one job on this machine, and show what its first process prints."
    stop = Stop()
    job = submit_here(cfg, stages, out, r)
    first = job.task(0).paths
    print(f"log: {first.stdout} and .err", flush=True)
    tails = [Tail(first.stdout, raw(sys.stdout)), Tail(first.stderr, raw(sys.stderr))]
    follow(job, stop, tails)
    status, line = outcome(job, stop, out)
    if tails[1].last != b"\n": print(file=sys.stderr, flush=True)  # a progress bar was cut short
    if status == 130: line = f"{line}: {again}"
    if line: print(line, file=sys.stderr, flush=True)
    return status


def follow(job, stop, tails):
    "Show what is printed until the job has ended, and hand on the requests to stop."
    asked, deadline, failed = 0.0, float("inf"), False
    while not job.done():
        for tail in tails: tail()
        now = time.monotonic()
        if stop.count == 1 and now > asked + 2:         # again and again: a job that is just starting is deaf
            if not asked: deadline = now + GRACE
            asked = now
            job._process.terminate()                    # submitit's controller hands it on
        if not failed and any(r and r[0] not in (0, 130) for r in results(job)):
            failed, deadline = True, min(deadline, now + ALONE)
        if stop.count > 1 or now > deadline: job._process.kill()  # the job sees that it is gone, and goes too
        time.sleep(0.05)
    for tail in tails: tail()


def results(job):
    "Exit status and line of each process; None where it has left none."
    from submitit.core.utils import pickle_load         # submitit's own results wait for all processes
    found = []
    for paths in (job.task(i).paths for i in range(job.num_tasks)):
        if not paths.result_pickle.exists():
            found.append(None)
            continue
        ended, result = pickle_load(paths.result_pickle)
        failed = (1, f"error: the job failed; its log: {paths.stderr}")
        found.append(result if ended == "success" else failed)
    return found


def outcome(job, stop, out):
    "Exit status and line of the whole job: what the process says that failed first, if that can be told."
    found = results(job)
    if stop.count and None in found: return 130, "interrupted at once; run the same command again to go on"
    ended = {i: r for i, r in enumerate(found) if r and r[0]}
    if stopped := [line for status, line in ended.values() if status == 130]: return 130, stopped[0]
    for i, (status, line) in ended.items():
        if status != jobs.LOST: return status, line if i == 0 else line.replace(":", f": rank {i}:", 1)
    for _, line in ended.values(): return 1, line
    if None not in found: return 0, ""
    return unsaid(job, found, out)


def unsaid(job, found, out):
    "As `outcome`, where a process has left no result: it was killed, or the disk is full."
    status, paths = 1, job.task(found.index(None)).paths
    log = next((p for p in (paths.stderr, paths.stdout) if p.exists()), paths.folder)
    line = f"error: the job failed; its log: {log}"
    try: ensure_folder(out)
    except BadInput as e: status, line = 2, f"error: {e}"
    said = [text for text in book.last_lines(paths.stderr, 5).splitlines() if text.startswith("error: ")]
    if said: line = said[-1] if found[0] is not None else ""  # that of the first process was shown
    return status, line


# ---- on Slurm

def refuse_queued(out) -> None:
    "Raise `BadInput` where jobs of this folder wait or run."
    if not os.path.lexists(book.book_file(out)): return
    if queued := book.live(book.noted(out)):
        said = ", ".join(f"{job.job} {' '.join(job.stages)}" for job in queued)
        raise BadInput(f"{out} has jobs in the queue: {said}; wait for them, or take them back: python "
                       f"slurm/launch.py cancel {out}")


def slurm(cfg, stages, out, r) -> int:
    "Submit one job per unfinished stage, each to start when the one before has succeeded."
    launch.forget_environment(r)
    submitted = []
    with contextlib.closing(pipeline.lock(out)), noting(out):
        todo = unfinished(cfg, stages, out)
        try:
            with new_folder(out) as folder:
                for stage in todo:
                    submitted.append(submit(cfg, stage, out, r, folder, submitted))
                    book.note(out, cfg, [entry(submitted[-1], "slurm", (stage,), folder)])
        except BaseException:
            for job in submitted: job.cancel(check=False)
            raise
    for stage, job in zip(todo, submitted):
        print(f"{stage:<9} job {job.job_id}  log: {job.task(0).paths.stdout}")
    print(f"python slurm/launch.py status {shlex.quote(str(out))} shows how far they are, and so do logs and "
          "cancel; once they have ended, the same command again submits what is left")
    return 0


def submit(cfg, stage, out, r, folder, before):
    "One job."
    import submitit
    own = launch.for_stage(r, cfg, stage)
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1000)
    after = [before[-1].job_id] if before else []
    executor.update_parameters(**launch.sbatch_parameters(cfg, stage, r, after))
    work = jobs.Job(cfg, (stage,), out.absolute(), own.gpus_per_node, .4 * launch.grace(own))
    try:
        with contextlib.redirect_stderr(io.StringIO()): return executor.submit(work)
    except submitit.core.utils.FailedJobError as e:
        last = (str(e).strip() or "?").splitlines()[-1]
        raise BadInput(f"sbatch refused the job of stage {stage}: {one_line(last)}") from None


# ---- nowhere

def dry_run(cfg, stages, out, r, cluster, redone=()) -> int:
    "Print the plan, and what sbatch would be given."
    from marval.report import show
    plan, refusals = pipeline.plan(cfg, stages, out, redone), []
    for check in (lambda: check_room(cfg, stages, out, r, cluster, redone),
                  lambda: pipeline.check(cfg, stages, out, redone)):
        try: check()
        except BadInput as e: refusals.append(str(e))
    if redone: print(f"what these stages have made in {out} would be removed: {', '.join(redone)}\n")
    print(show(plan))
    if r.gpus: show_forecast(cfg, stages, r)
    gpus = f"{r.gpus} ({r.nodes} x {r.gpus_per_node})" if r.gpus else "none"
    print(f"\nfolder  {out}\ndata    {cfg.data.path or cfg.data.name}\nGPUs    {gpus}\ncluster {cluster}")
    for line in refusals: print(f"refused as it stands: {line}")
    if cluster == "slurm" or r.gpus: show_scripts(cfg, unfinished(cfg, stages, out, redone), out, r)
    return 0


def show_forecast(cfg, stages, r):
    "Memory and days."
    from marval.plan import REACHED, forecast
    from marval.report import show
    trained = tuple(s for s in stages if s != "teacher" or not cfg.teacher.checkpoint)
    if table := forecast(cfg, trained, r.gpus):
        said = f"{r.gpus} GPUs at {REACHED:.0%} of their bf16 peak (assumed)"
        print(f"\nmemory a GPU in GB, and days on {said}\n{show(table)}")


def show_scripts(cfg, stages, out, r):
    "What sbatch would be given."
    before, folder = "", book.jobs_folder(out).absolute() / "LAUNCH"
    for stage in stages:
        after = [f"JOB_OF_{before.upper()}"] if before else []
        text = launch.script(launch.sbatch_parameters(cfg, stage, r, after), folder).rstrip()
        print(f"\n# ---- {stage}" + (f", after {before}" if before else "") + f"\n{text}")
        before = stage


# ---- later

def look_after(argv) -> int:
    "`status`, `logs` and `cancel` of a run."
    p = Parser(prog=f"launch.py {argv[0]}", allow_abbrev=False)
    p.add_argument("run", metavar="RUN", help="run folder")
    if argv[0] == "logs":
        p.add_argument("--stage", help="whose log (default: what was written last)")
        p.add_argument("--lines", type=int, default=20, metavar="N", help="from the end (default: 20)")
        p.add_argument("--follow", action="store_true", help="go on until the job ends, or Ctrl-C")
    args = p.parse_args(argv[1:])
    for name, value in vars(args).items(): printable(name, value)
    out = typed_path("RUN", args.run)
    if argv[0] == "logs": show_logs(out, args)
    elif argv[0] == "cancel":
        for job in (gone := book.cancel(out)): print(f"job {job.job} ({', '.join(job.stages)}) is taken back")
        if not gone: print(f"no job of {out} waits or runs; nothing to cancel")
    else:
        from marval.report import show
        print(show(book.status(out)))
        if pid := book.holder(out): print(f"process {pid} of this machine works in {out}")
    return 0


def show_logs(out, args):
    "The end of a job's output, and what follows."
    lines = checked(Annotated[int, Range(1, 100_000)], args.lines, "--lines")
    job, files = book.log_files(out, args.stage)
    tails = [Tail(f, plain, f.stat().st_size if f.is_file() else 0) for f in files]
    for f in (f for f in files if f.is_file()): print(f"==> {f} <==\n{book.last_lines(f, lines)}", flush=True)
    running = lambda: bool(book.live([job])) if job.cluster == "slurm" else bool(book.holder(out))
    with contextlib.suppress(KeyboardInterrupt):
        while args.follow and running():
            end = time.monotonic() + 5                  # the controller is asked every five seconds
            while time.monotonic() < end:
                for tail in tails: tail()
                time.sleep(0.5)
    for tail in tails if args.follow else (): tail()


# ---- now

def unfinished(cfg, stages, out, redone=()):
    "Stages that are still to be done."
    return tuple(s for s in stages if s in redone or pipeline.state(cfg, s, out) != "done")


def check_room(cfg, stages, out, r, cluster, redone):
    "Memory, and disk for what is still to be done."
    launch.check_room(cfg, stages, r, cluster)
    check_disk(cfg, unfinished(cfg, stages, out, redone), out)


def start(argv) -> int:
    "Read, check, and start or print."
    args = arguments(argv)
    cfg = configuration(args)
    stages = pipeline.select(args.stage, cfg)
    out = run_folder(f"runs/{args.scale}" if args.out is None else args.out)
    r = launch.resources(args.scale, {k: getattr(args, k) for k in ASKED})
    cluster = pick_cluster(args.cluster, args.dry_run)
    launch.check_batches(cfg, stages, r)
    redone = pipeline.dependants(args.redo, cfg) if args.redo is not None else ()
    if args.dry_run: return dry_run(cfg, stages, out, r, cluster, redone)
    if cluster == "slurm" or not r.gpus: launch.check_room(cfg, stages, r, cluster)
    if set(pipeline.check(cfg, stages, out, redone).values()) == {"done"} and not redone:
        print(f"{', '.join(stages)}: finished before; nothing to do in {out}")
        return 0
    if cluster == "local":
        r = fit_here(r, args.scale)
        launch.check_batches(cfg, stages, r)
    check_room(cfg, stages, out, r, cluster, redone)
    with alone(out, cluster):
        if redone and (gone := pipeline.redo(args.redo, cfg, out)):
            print(f"removed from {out}: {', '.join(gone)}", flush=True)
        if cluster == "slurm": return slurm(cfg, stages, out, r)
        return local(cfg, stages, out, r, shlex.join(["python", sys.argv[0], *without_redo(argv)]))


@contextlib.contextmanager
def alone(out, cluster):
    "Be the only launcher of a run. Raises `BadInput` where a process works in its folder, or jobs wait."
    ensure_folder(out)
    pipeline.lock(out).close()                          # in use? say so before anything is changed
    with book.launching(out):
        if cluster == "slurm":
            with contextlib.closing(pipeline.lock(out)): repair(out)
            refuse_queued(out)
        yield


def without_redo(argv):
    "The same command, to go on with."
    return [a for before, a in zip(["", *argv], argv)
            if before != "--redo" and a != "--redo" and not a.startswith("--redo=")]


@entry_point
def main(argv=None) -> int:
    "Returns the exit status: 0 done, 2 bad input, 130 interrupted, 1 anything else."
    if argv[:1] and argv[0] in ("status", "logs", "cancel"): return look_after(argv)
    try: return start(argv)
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        return 130


if __name__ == "__main__":
    status = main()
    # one that comes while Python shuts down must not replace the status
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)
    sys.exit(status)
