#!/usr/bin/env python3
"""Start a run, here or on Slurm, and look after it.

  python slurm/launch.py --scale digits                       the whole road on real digits, in minutes, on this machine
  python slurm/launch.py --scale huge --data IMAGENET --teacher huge.pth --vae kl16.ckpt --out RUN
                                                              ImageNet on 8 GPUs: one Slurm job per stage, each after the one before
  python slurm/launch.py --scale huge --dry-run               plan, memory, days, and the scripts for sbatch; nothing is started or written
  python slurm/launch.py ... --nodes 4 --partition a100 --account me --time 1-00:00:00 --setup "module load cuda" --sbatch exclusive mail-user=me@home
  python slurm/launch.py --scale digits --stage distill       one stage, from what the run folder holds
  python slurm/launch.py --scale digits --set sampling.cfg=2 rl.anchor=0 --out runs/cfg2
  python slurm/launch.py --scale digits --redo rl --set rl.lr=5e-5  start a stage over, with other settings

  python slurm/launch.py status RUN                           how far each stage is, and what Slurm says of its job
  python slurm/launch.py logs RUN [--stage S] [--lines N] [--follow]
  python slurm/launch.py cancel RUN                           take back the jobs that wait or run

The same command again goes on where the last one ended: finished stages are skipped, an interrupted one is resumed. Ctrl-C stops
after the current step, a second Ctrl-C at once. A job that Slurm takes away saves itself, is queued again and goes on. What is not said here,
sbatch reads from SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS and the like.
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

from marval import book, launch, pipeline
from marval.config import SCALES, BadInput, override, preset
from marval.files import ensure_folder

GRACE = 60      # seconds that a local job has to finish its step and save, before it is killed
FILES = dict(data="data.path", vae="data.vae", names="data.names", teacher="teacher.checkpoint", reward="rl.reward_weights")
ASKED = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem", "time", "partition", "account", "qos", "constraint", "setup", "sbatch")
LOCALLY = ("nodes", "gpus_per_node", "tasks_per_node", "setup")  # of these, what a run on this machine understands


class Parser(argparse.ArgumentParser):
    "An argument parser whose complaints are `BadInput`, one line like all others."
    def error(self, message): raise BadInput(f"{message}; --help shows what is accepted")


def arguments(argv):
    "The command line of a start."
    p = Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--scale", required=True, help=" | ".join(SCALES))
    p.add_argument("--stage", default="all", help=" | ".join((*pipeline.STAGES, "all")) + " (default: all)")
    p.add_argument("--cluster", default="auto", help="auto | slurm | local; auto = Slurm where there is an sbatch and a controller answers (default: auto)")
    p.add_argument("--out", metavar="DIR", help="run folder (default: runs/SCALE); on Slurm, where all nodes see it")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    p.add_argument("--redo", metavar="STAGE", help="remove what this stage, and those that depend on it, have made in the run folder; then start")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="other values for single fields, as in distill.lr=1e-4")
    g = p.add_argument_group("files, for all scales but digits and smoke")
    g.add_argument("--data", metavar="DIR", help="images, DIR/CLASS/IMAGE")
    g.add_argument("--vae", metavar="FILE", help="weights of the tokenizer, MAR's kl16.ckpt")
    g.add_argument("--teacher", metavar="FILE", help="a trained teacher, MAR's public checkpoint or ours; without it, one is trained")
    g.add_argument("--reward", metavar="FILE", help="weights of the reward, such as PickScore's; of a sum, NAME=FILE,NAME=FILE (default: from Hugging Face's cache)")
    g.add_argument("--names", metavar="FILE", help="JSON {class folder: name}, for prompts (default: ImageNet's names)")
    g = p.add_argument_group("what each job asks for")
    g.add_argument("--nodes", type=int, metavar="N", help="machines (default: 1)")
    g.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs on each, one process a GPU (default: 8; digits, smoke, tiny: 0)")
    g.add_argument("--tasks-per-node", type=int, metavar="N", help="processes on each, for runs without GPUs (default: 1)")
    g.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores a process")
    g.add_argument("--mem", metavar="SIZE", help="memory of a node, as in 480G; 0 = all")
    g.add_argument("--time", metavar="TIME", help="minutes, HH:MM:SS or D-HH:MM:SS; a job that needs longer is queued again")
    for name in ("partition", "account", "qos", "constraint"): g.add_argument(f"--{name}", metavar="NAME", help="as for sbatch")
    g.add_argument("--setup", nargs="+", action="extend", default=[], metavar="CMD", help="shell commands before Python starts, each in quotes")
    g.add_argument("--sbatch", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="any other option of sbatch, as in gres=gpu:a100:8")
    return p.parse_args(argv)


def configuration(args):
    "Preset, files and single values."
    if args.reward: from marval.reward_sums import absolute_files
    cfg = preset(args.scale, args.seed)
    given = {name: path for name in FILES if (path := getattr(args, name)) is not None}
    if given and cfg.data.name == "digits": raise BadInput(f"--{next(iter(given))}: scale {args.scale} brings all it needs; expected another scale, or no such option")
    for name, path in given.items():
        if not path: raise BadInput(f"--{name} '': expected a path")
    absolute = lambda name, path: absolute_files(path) if name == "reward" else Path(path).expanduser().absolute()
    return override(cfg, [*(f"{FILES[name]}={absolute(name, path)}" for name, path in given.items()), *args.set])


def pick_cluster(wish: str, dry_run: bool) -> str:
    "`slurm` or `local`."
    if wish not in ("auto", "slurm", "local"): raise BadInput(f"--cluster {wish!r}: expected auto, slurm or local")
    if wish == "local" or dry_run and wish == "slurm": return wish
    if wish == "auto" and not book.slurm_answers(): return "local"
    missing = [tool for tool in ("sbatch", "srun") if not shutil.which(tool)]
    if missing: raise BadInput(f"--cluster slurm: no {missing[0]} on PATH; expected a Slurm login node, or --cluster local")
    if wish == "slurm" and not book.slurm_answers(): raise BadInput("--cluster slurm: sbatch is here, but no Slurm controller answers (sinfo fails); expected a Slurm login node, or --cluster local")
    return "slurm"


def fit_here(r, scale: str):
    "What a run asks for, on this machine. Raises `BadInput` where it hasn't got that."
    if stray := [k for k in r.given if k not in LOCALLY]: raise BadInput(f"--{stray[0].replace('_', '-')}: an option of Slurm jobs, and this run is one of this machine (--cluster local, or no Slurm controller answers)")
    if r.nodes > 1: raise BadInput(f"--nodes {r.nodes}: a run on this machine has one; expected 1, or Slurm")
    if not r.gpus_per_node: return r
    import torch
    found = torch.cuda.device_count()
    if "gpus_per_node" not in r.given and found: return launch.resources(scale, dict(gpus_per_node=found, setup=list(r.setup)))
    if r.gpus_per_node > found: raise BadInput(f"scale {scale} asks for {r.gpus_per_node} GPUs, and this machine has {found}; expected Slurm, or --gpus-per-node 0 to {found}")
    return r


def logs_folder(out: Path) -> Path:
    "Of this launch alone: job ids repeat."
    return out.absolute() / "state" / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


class Tail:
    "Copies what is appended to a file, byte by byte, so that a progress bar looks as it does in its own terminal."
    def __init__(self, path, to, at=0): self.path, self.to, self.at = path, to.buffer, at

    def __call__(self):
        if not self.path.exists(): return
        with open(self.path, "rb") as f:
            f.seek(self.at)
            if new := f.read():
                self.at += len(new)
                self.to.write(new)
                self.to.flush()


class Stop:
    "Counts the requests to stop."
    def __init__(self):
        self.count = 0
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(s) is not signal.SIG_IGN: signal.signal(s, self)

    def __call__(self, *_): self.count += 1


def submit_local(cfg, stages, out, r):
    "Start the one local job. It inherits an ignored SIGINT: Ctrl-C is this process's to answer, submitit's controller would kill the job a second later."
    import submitit
    os.environ["SUBMITIT_LOG_LEVEL"] = "CRITICAL"
    if sys.stderr.isatty(): os.environ["COLUMNS"] = str(shutil.get_terminal_size().columns)
    else: os.environ.pop("COLUMNS", None)               # nobody watches: a line now and then will do
    folder = ensure_folder(logs_folder(out))
    executor = submitit.LocalExecutor(folder=folder)
    visible = [int(i) for i in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if i.isdigit()][:r.gpus_per_node]
    executor.update_parameters(timeout_min=60 * 24 * 3650, tasks_per_node=r.tasks_per_node, gpus_per_node=r.gpus_per_node, setup=r.setup, **({"visible_gpus": visible} if visible else {}))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try: job = executor.submit(launch.Job(cfg, stages, out, r.gpus_per_node, launcher=os.getpid()))
    finally: signal.signal(signal.SIGINT, before)
    book.note(out, cfg, "local", job.job_id, stages, folder)
    return job


def local(cfg, stages, out, r, again: str) -> int:
    "Run everything in one job on this machine and show what its first process prints. Returns the exit status."
    stop = Stop()
    job = submit_local(cfg, stages, out, r)
    first, all_there = job.task(0), lambda: all(job.task(i).paths.result_pickle.exists() for i in range(job.num_tasks))
    tails, asked, deadline = [Tail(first.paths.stdout, sys.stdout), Tail(first.paths.stderr, sys.stderr)], 0.0, float("inf")
    print(f"log: {first.paths.stdout} and .err", flush=True)
    while not job.done():
        for tail in tails: tail()
        now = time.monotonic()
        if stop.count == 1 and now > asked + 2:         # asked again and again: a job that is just starting is deaf
            if not asked: deadline = now + GRACE
            asked = now
            job._process.terminate()                    # submitit's controller hands it on
        if stop.count > 1 or now > deadline: job._process.kill()    # the job sees that submitit's controller is gone, and goes too
        time.sleep(0.05)
    for tail in tails: tail()
    if stop.count and not all_there(): status, line = 130, "interrupted at once; run the same command again to go on"
    elif not all_there() or job.exception():
        ensure_folder(out)                              # a disk too full for the result is the likeliest reason, and says so here
        status, line = 1, f"error: the job failed; its log: {first.paths.stderr}"
    else: status, line = first.result()
    if status == 130: line = f"{line}: {again}"
    if line: print(line, file=sys.stderr, flush=True)
    return status


def refuse_queued(out) -> None:
    "Raise `BadInput` where jobs of this folder wait or run."
    if queued := book.book_file(out).exists() and book.live(book.noted(out)[1]):
        raise BadInput(f"{out} has jobs in the queue: {', '.join(j['job'] + ' ' + ' '.join(j['stages']) for j in queued)}; wait for them, or take them back: python slurm/launch.py cancel {out}")


def slurm(cfg, stages, out, r) -> int:
    "Submit one job per unfinished stage, each to start when the one before has succeeded."
    import submitit
    folder, jobs = ensure_folder(logs_folder(out)), []
    launch.forget_environment(r)
    for stage in (s for s in stages if pipeline.state(cfg, s, out) != "done"):
        own, executor = launch.for_stage(r, cfg, stage), submitit.SlurmExecutor(folder=folder, max_num_timeout=1000)
        executor.update_parameters(**launch.sbatch_parameters(cfg, stage, r, [jobs[-1].job_id] if jobs else []))
        try:
            with contextlib.redirect_stderr(io.StringIO()): jobs.append(executor.submit(launch.Job(cfg, (stage,), out.absolute(), own.gpus_per_node, .4 * launch.grace(own))))
        except submitit.core.utils.FailedJobError as e:
            for job in jobs: job.cancel(check=False)
            raise BadInput(f"sbatch refused the job of stage {stage}: {str(e).strip().splitlines()[-1]}") from None
        book.note(out, cfg, "slurm", jobs[-1].job_id, (stage,), folder)
        print(f"{stage:<9} job {jobs[-1].job_id}  log: {jobs[-1].task(0).paths.stdout}")
    print(f"python slurm/launch.py status {shlex.quote(str(out))} shows how far they are, and so do logs and cancel; once they have ended, the same command again submits what is left")
    return 0


def dry_run(cfg, stages, out, r, cluster, redone=()) -> int:
    "Print the plan, and what sbatch would be given."
    from marval.report import show
    if redone: print(f"what these stages have made in {out} would be removed: {', '.join(redone)}\n")
    print(show(pipeline.plan(cfg, stages, out, redone)))
    if r.gpus:
        from marval.plan import REACHED, forecast
        trained = tuple(s for s in stages if s != "teacher" or not cfg.teacher.checkpoint)
        if table := forecast(cfg, trained, r.gpus): print(f"\nmemory a GPU in GB, and days on {r.gpus} GPUs at {REACHED:.0%} of their bf16 peak (assumed)\n{show(table)}")
    print(f"\nfolder  {out}\ndata    {cfg.data.path or cfg.data.name}\nGPUs    {f'{r.gpus} ({r.nodes} x {r.gpus_per_node})' if r.gpus else 'none'}\ncluster {cluster}")
    try: pipeline.check(cfg, stages, out, redone)
    except BadInput as e: print(f"refused as it stands: {e}")
    if cluster == "local" and not r.gpus: return 0
    before, folder = "", out.absolute() / "state" / "jobs" / "LAUNCH"
    for stage in (s for s in stages if s in redone or pipeline.state(cfg, s, out) != "done"):
        after = [f"JOB_OF_{before.upper()}"] if before else []
        print(f"\n# ---- {stage}" + (f", after {before}" if before else "") + "\n" + launch.script(launch.sbatch_parameters(cfg, stage, r, after), folder).rstrip())
        before = stage
    return 0


def look_after(argv) -> int:
    "`status`, `logs` and `cancel` of a run."
    p = Parser(prog=f"launch.py {argv[0]}", allow_abbrev=False)
    p.add_argument("run", metavar="RUN", help="run folder")
    if argv[0] == "logs":
        p.add_argument("--stage", help="whose log (default: what was written last)")
        p.add_argument("--lines", type=int, default=20, metavar="N", help="how many lines from the end (default: 20)")
        p.add_argument("--follow", action="store_true", help="go on until the job ends, or Ctrl-C")
    args = p.parse_args(argv[1:])
    out = Path(args.run)
    if argv[0] == "status":
        from marval.report import show
        print(show(book.status(out)))
        if pid := book.holder(out): print(f"process {pid} of this machine works in {out}")
    elif argv[0] == "cancel":
        for job in (gone := book.cancel(out)): print(f"job {job['job']} ({', '.join(job['stages'])}) is taken back")
        if not gone: print(f"no job of {out} waits or runs; nothing to cancel")
    else: logs(out, args)
    return 0


def logs(out, args):
    "The end of a job's output, and what follows."
    if not 0 < args.lines <= 100_000: raise BadInput(f"--lines {args.lines}: expected 1 to 100000")
    job, files = book.log_files(out, args.stage)
    tails = [Tail(f, sys.stdout, f.stat().st_size if f.exists() else 0) for f in files]
    for f in (f for f in files if f.exists()): print(f"==> {f} <==\n{book.last_lines(f, args.lines)}", flush=True)
    running = lambda: bool(book.live([job])) if job["cluster"] == "slurm" else bool(book.holder(out))
    with contextlib.suppress(KeyboardInterrupt):
        while args.follow and running():
            end = time.monotonic() + 5                  # the controller is asked every five seconds, the files ten times as often
            while time.monotonic() < end:
                for tail in tails: tail()
                time.sleep(0.5)
    for tail in tails if args.follow else (): tail()


def start(argv) -> int:
    "Read, check, and start or print."
    args = arguments(argv)
    cfg = configuration(args)
    stages, out, r = pipeline.select(args.stage, cfg), Path(args.out or f"runs/{args.scale}"), launch.resources(args.scale, {k: getattr(args, k) for k in ASKED})
    cluster = pick_cluster(args.cluster, args.dry_run)
    launch.check_batches(cfg, stages, r)
    redone = pipeline.dependants(args.redo, cfg) if args.redo is not None else ()
    if args.dry_run: return dry_run(cfg, stages, out, r, cluster, redone)
    if set(pipeline.check(cfg, stages, out, redone).values()) == {"done"} and not redone:
        print(f"{', '.join(stages)}: finished before; nothing to do in {out}")
        return 0
    if cluster == "local":
        r = fit_here(r, args.scale)
        launch.check_batches(cfg, stages, r)
    ensure_folder(out)
    pipeline.lock(out).close()                          # in use? say so before a job is started
    if cluster == "slurm": refuse_queued(out)
    if redone and (gone := pipeline.redo(args.redo, cfg, out)): print(f"removed from {out}: {', '.join(gone)}", flush=True)
    return slurm(cfg, stages, out, r) if cluster == "slurm" else local(cfg, stages, out, r, shlex.join(["python", sys.argv[0], *without_redo(argv)]))


def without_redo(argv):
    "The same command, to go on with."
    return [a for before, a in zip(["", *argv], argv) if before != "--redo" and a != "--redo" and not a.startswith("--redo=")]


def main(argv=None) -> int:
    "Returns the exit status: 0 done, 2 bad input, 130 interrupted."
    argv = sys.argv[1:] if argv is None else argv
    try: return look_after(argv) if argv[:1] and argv[0] in ("status", "logs", "cancel") else start(argv)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:                             # `logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        print(f"error: {e.strerror or e}: {e.filename or 'a pipe'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        return 130


if __name__ == "__main__":
    status = main()
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)   # one that comes while Python shuts down must not replace the status
    sys.exit(status)
