#!/usr/bin/env python3
"""Start a run, here or on Slurm: teacher, distillation, RL, evaluation.

  python slurm/launch.py --scale digits                       the whole road on real digits, in minutes, on this machine
  python slurm/launch.py --scale base --dry-run               what a scale would take; nothing is started, nothing is written
  python slurm/launch.py --scale digits --stage distill       one stage, from what the run folder holds
  python slurm/launch.py --scale digits --set sampling.cfg=2 rl.anchor=0 --out runs/cfg2

The same command again goes on where the last one ended: finished stages are skipped, an interrupted one is resumed. Ctrl-C stops
after the current step, a second Ctrl-C at once. On Slurm, sbatch reads site settings from SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS.
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

from marval import pipeline
from marval.config import SCALES, BadInput, override, preset
from marval.files import ensure_folder

# What a stage's job asks Slurm for. 8 GPUs are the paper's; all else is ours. A job that is cut off is queued again and resumes.
TINY = dict(nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=2, mem_gb=8, timeout_min=60)
BIG = dict(nodes=1, tasks_per_node=8, gpus_per_node=8, cpus_per_task=12, mem_gb=480, timeout_min=72 * 60)
RESOURCES = dict(smoke=TINY, digits=TINY, base=BIG, large=BIG, huge=BIG)
GRACE = 60      # seconds that a job has to finish its step and save, before it is killed


class Parser(argparse.ArgumentParser):
    "An argument parser whose complaints are `BadInput`, one line like all others."
    def error(self, message): raise BadInput(f"{message}; --help shows what is accepted")


class Job:
    "What runs inside a job. Slurm calls `checkpoint` when it takes the machine away; the job it queues again resumes from its own files."
    def __init__(self, cfg, stages, out, launcher=None): self.cfg, self.stages, self.out, self.launcher = cfg, stages, out, launcher

    def __call__(self):
        status, line = pipeline.guarded(self.cfg, self.stages, self.out, launcher=self.launcher)
        if self.launcher is None and status:            # Slurm reads the exit status: `afterok` must not start the next stage
            print(line, file=sys.stderr, flush=True)
            raise SystemExit(status)
        return status, line

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission
        return DelayedSubmission(self)


def arguments(argv):
    "The command line."
    p = Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--scale", required=True, help=" | ".join(SCALES))
    p.add_argument("--stage", default="all", help=" | ".join((*pipeline.STAGES, "all")) + " (default: all)")
    p.add_argument("--cluster", default="auto", help="auto | slurm | local; auto = Slurm where sbatch exists (default: auto)")
    p.add_argument("--out", metavar="DIR", help="run folder (default: runs/SCALE)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="other values for single fields, as in distill.lr=1e-4")
    return p.parse_args(argv)


def pick_cluster(wish: str, dry_run: bool) -> str:
    "`slurm` or `local`."
    if wish not in ("auto", "slurm", "local"): raise BadInput(f"--cluster {wish!r}: expected auto, slurm or local")
    picked = wish if wish != "auto" else "slurm" if shutil.which("sbatch") else "local"
    missing = [tool for tool in ("sbatch", "srun") if picked == "slurm" and not dry_run and not shutil.which(tool)]
    if missing: raise BadInput(f"--cluster slurm: no {missing[0]} on PATH; expected a Slurm login node, or --cluster local")
    return picked


def logs(out: Path) -> Path:
    "A folder of its own for this launch: job ids repeat."
    return ensure_folder(out / "state" / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


class Tail:
    "Copies what is appended to a file, byte by byte, so that a progress bar looks as it does in its own terminal."
    def __init__(self, path, to): self.path, self.to, self.at = path, to.buffer, 0

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


def submit_local(cfg, stages, out):
    "Start the one local job. It inherits an ignored SIGINT: Ctrl-C is this process's to answer, submitit's controller would kill the job a second later."
    import submitit
    os.environ["SUBMITIT_LOG_LEVEL"] = "CRITICAL"
    if sys.stderr.isatty(): os.environ["COLUMNS"] = str(shutil.get_terminal_size().columns)
    else: os.environ.pop("COLUMNS", None)               # nobody watches: a line now and then will do
    executor = submitit.LocalExecutor(folder=logs(out))
    executor.update_parameters(timeout_min=60 * 24 * 3650)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try: return executor.submit(Job(cfg, stages, out, launcher=os.getpid()))
    finally: signal.signal(signal.SIGINT, before)


def local(cfg, stages, out, again: str) -> int:
    "Run everything in one job on this machine and show what it prints. Returns the exit status."
    stop = Stop()
    job = submit_local(cfg, stages, out)
    tails, asked, deadline = [Tail(job.paths.stdout, sys.stdout), Tail(job.paths.stderr, sys.stderr)], 0.0, float("inf")
    print(f"log: {job.paths.stdout} and .err", flush=True)
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
    if stop.count and not job.paths.result_pickle.exists(): status, line = 130, "interrupted at once; run the same command again to go on"
    elif not job.paths.result_pickle.exists() or job.exception():
        ensure_folder(out)                              # a disk too full for the result is the likeliest reason, and says so here
        status, line = 1, f"error: the job failed; its log: {job.paths.stderr}"
    else: status, line = job.result()
    if status == 130: line = f"{line}: {again}"
    if line: print(line, file=sys.stderr, flush=True)
    return status


def slurm(cfg, stages, out) -> int:
    "Submit one job per unfinished stage, each to start when the one before has succeeded."
    import submitit
    executor, jobs = submitit.SlurmExecutor(folder=logs(out), max_num_timeout=1000), []
    todo = [s for s in stages if pipeline.state(cfg, s, out) != "done"]
    for stage in todo:
        executor.update_parameters(**sbatch_parameters(cfg, stage, [jobs[-1].job_id] if jobs else []))
        try:
            with contextlib.redirect_stderr(io.StringIO()): jobs.append(executor.submit(Job(cfg, (stage,), out.absolute())))
        except submitit.core.utils.FailedJobError as e:
            for job in jobs: job.cancel(check=False)
            raise BadInput(f"sbatch refused the job of stage {stage}: {str(e).strip().splitlines()[-1]}") from None
        print(f"{stage:<9} job {jobs[-1].job_id}  log: {jobs[-1].paths.stdout}")
    print("squeue shows the jobs; once they have ended, the same command again submits what is left")
    return 0


def sbatch_parameters(cfg, stage, after=()) -> dict:
    "submitit's names for what a job asks for."
    r = RESOURCES[cfg.scale]
    own = dict(job_name=f"marval-{cfg.scale}-{stage}", time=r["timeout_min"], mem=f"{r['mem_gb']}GB", ntasks_per_node=r["tasks_per_node"],
               signal_delay_s=120, additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes"}, **{k: r[k] for k in ("nodes", "cpus_per_task")})
    if r["gpus_per_node"]: own["gpus_per_node"] = r["gpus_per_node"]
    if after: own["dependency"] = "afterok:" + ":".join(after)
    return own


def dry_run(cfg, stages, out, cluster) -> int:
    "Print the plan."
    from marval.report import show
    print(show(pipeline.plan(cfg, stages, out)))
    r = RESOURCES[cfg.scale]
    if gpus := r["nodes"] * r["gpus_per_node"]:
        from marval.plan import REACHED, forecast
        print(f"\nmemory a GPU in GB, and days on {gpus} GPUs at {REACHED:.0%} of their bf16 peak (assumed)\n{show(forecast(cfg, stages, gpus))}")
    print(f"\nfolder  {out}\ndata    {cfg.data.name}\nGPUs    {r['gpus_per_node'] or 'none'}\ncluster {cluster}"
          + ("" if cluster == "slurm" else " (on Slurm: the parameters below)"))
    for k, v in sbatch_parameters(cfg, "STAGE", ["PREVIOUS"]).items(): print(f"  {k} = {v}")
    return 0


def main(argv=None) -> int:
    "Returns the exit status: 0 done, 2 bad input, 130 interrupted."
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = arguments(argv)
        cfg = override(preset(args.scale, args.seed), args.set)
        stages, cluster, out = pipeline.select(args.stage, cfg), pick_cluster(args.cluster, args.dry_run), Path(args.out or f"runs/{args.scale}")
        if args.dry_run: return dry_run(cfg, stages, out, cluster)
        if set(pipeline.check(cfg, stages, out).values()) == {"done"}:
            print(f"{', '.join(stages)}: finished before; nothing to do in {out}")
            return 0
        ensure_folder(out)
        pipeline.lock(out).close()                      # in use? say so before a job is started
        return slurm(cfg, stages, out) if cluster == "slurm" else local(cfg, stages, out, shlex.join(["python", sys.argv[0], *argv]))
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {e.strerror or e}: {e.filename or args.out or 'a pipe'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        return 130


if __name__ == "__main__": sys.exit(main())
