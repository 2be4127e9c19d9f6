"""What the user sees of a job: what would go along, where it is, what it says, how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.command import print_json
from cluster.console import StreamConsole

if TYPE_CHECKING:
    from cluster.jobs import JobInfo, Jobs
    from cluster.submit import Submission


def show_plan(console: StreamConsole, submission: Submission, address: str, as_json: bool) -> None:
    """Prints what a submission would do."""
    if as_json:
        print_json({"address": address, **submission.to_json()})
    else:
        console.say(f"What would be submitted to {address} (nothing was):\n{submission.told()}")


def send_and_follow(console: StreamConsole, jobs: Jobs, submission: Submission, detach: bool, as_json: bool) -> int:
    """The exit code, once the job is submitted and, unless detached, over."""
    from cluster.job_watch import describe
    from cluster.jobs import FOLDER
    from cluster.ray_jobs import access, warnings_of
    from cluster.submit import send

    for line in warnings_of(jobs.address, access(jobs.address)):
        console.warn(line)
    with console:  # no longer: a job that is followed has a beat of its own
        send(jobs, submission, console)
    job_id = submission.job.job_id
    console.say(f"run        {submission.run}, in {submission.job.metadata[FOLDER]} on the cluster")
    console.say(f"job        {job_id} at {jobs.address}")
    if "WANDB_API_KEY" in submission.secret_names:
        console.say("W&B        its link is in the log when the run begins, and in `tenfold status`")
    else:
        console.say("W&B        no WANDB_API_KEY goes along; without one on the cluster the run is kept offline")
    if submission.secret_names:
        console.say(
            f"secrets    {', '.join(submission.secret_names)}: Ray shows them to whoever has the cluster's token, and "
            "writes them into runtime_env_agent.log on its nodes; --no-secrets passes none on"
        )
    console.say(f"           tenfold status|logs|stop|resume {submission.run} --address {jobs.address}")
    code = 0
    if not detach:
        code = follow_to_end(console, jobs, job_id, submission.run)
    if as_json or not detach:
        info = jobs.info(job_id)
        about = describe(info, jobs.address, jobs.logs(job_id) if info.is_over else "")
        if as_json:
            print_json(about)
        elif about["wandb"]:
            console.say(f"W&B        {about['wandb']}")
    return code


def follow_to_end(console: StreamConsole, jobs: Jobs, job_id: str, run: str) -> int:
    """The exit code of a job that is followed to its end."""
    from cluster.job_watch import Lines, follow

    lines = Lines(console.say)
    try:
        info = follow(jobs, job_id, lines.write)
    except KeyboardInterrupt:
        console.say(
            f"the job goes on: `tenfold logs {run} --follow` or `tenfold stop {run}`, with --address {jobs.address}"
        )
        return 0
    finally:
        lines.close()
    return _tell_end(console, info)


def _tell_end(console: StreamConsole, info: JobInfo) -> int:
    if info.state == "SUCCEEDED":
        console.say(f"{info.job_id}: done")
        return 0
    if info.state == "STOPPED":
        console.say(f"{info.job_id}: stopped; what was committed is kept")
        return 143
    # The log has been printed already; the message repeats its end, unless the job never came so far.
    why = "" if info.exit_code is not None else f": {info.message[-2000:]}"
    console.error(f"{info.job_id} failed{f' with exit code {info.exit_code}' if info.exit_code else ''}{why}")
    return info.exit_code or 1
