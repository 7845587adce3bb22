"""Stands in for `gcloud compute tpus` under launch/tpu_pod.sh: a queue, a slice, its workers.

FAKE_CLOUD is a folder. In it, `calls.jsonl` notes each call; `cloud.json` is the cloud:

  request, node   their states as gcloud tells them; null where there is none
  queue           the states that a new request goes through, a `describe` each, before ACTIVE
  exits           for each `start` on the workers, the FAKE_TRAIN_EXIT of every worker
  failures        calls to fail: {"match": part of the call, "times": N, "message": its error,
                  "code": exit code, "preempt": whether the slice is taken away there and then,
                  "late": whether all was done and only the answer got lost}

A worker is a folder, its home; a new slice has new ones. What `ssh` says is run there.
"""

import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
ARGUMENTS = sys.argv[1:]
CALL = " ".join(ARGUMENTS)


class Failure(Exception):
    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def flag(name):
    return next((a.partition("=")[2] for a in ARGUMENTS if a.startswith(name + "=")), None)


def homes(cloud):
    return [CLOUD / f"slice{cloud['slices']}" / str(n) for n in range(cloud["workers"])]


def fail_on_purpose(cloud, late):
    for failure in cloud["failures"]:
        if failure["match"] in CALL and failure["times"] > 0 and failure.get("late", False) == late:
            failure["times"] -= 1
            if failure.get("preempt"):
                cloud["node"] = "PREEMPTED"
            raise Failure(failure.get("message", "ERROR: UNAVAILABLE"), failure.get("code", 1))


def create(cloud):
    if cloud["request"]:
        raise Failure("ERROR: ALREADY_EXISTS: Resource already exists")
    cloud["request"] = "CREATING"
    cloud["waiting"] = [*cloud["queue"], "ACTIVE"]
    cloud["node"] = "READY"
    cloud["slices"] += 1
    for home in homes(cloud):
        home.mkdir(parents=True)


def describe_request(cloud):
    if not cloud["request"]:
        raise Failure("ERROR: NOT_FOUND: Resource was not found")
    if cloud["request"] != "FAILED" and cloud.get("waiting"):
        cloud["request"] = cloud["waiting"].pop(0)
    print(cloud["request"])


def delete(cloud):
    if not cloud["request"]:
        raise Failure("ERROR: NOT_FOUND: Resource was not found")
    cloud["request"] = cloud["node"] = None


def reachable(cloud):
    if cloud["node"] != "READY":
        raise Failure(f'ERROR: This TPU has terminal state "{cloud["node"]}"')
    everyone = homes(cloud)
    return everyone if flag("--worker") == "all" else [everyone[int(flag("--worker"))]]


def scp(cloud):
    for home in reachable(cloud):
        source = pathlib.Path(ARGUMENTS[4])
        shutil.copytree(source, home / source.name, dirs_exist_ok=True)


def ssh(cloud):
    """The workers' processes, started; waited for when the cloud is free for other calls."""
    command = flag("--command")
    exits = ["0"] * cloud["workers"]
    if "worker.sh start" in command and cloud["exits"]:
        exits = cloud["exits"].pop(0)
    return [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=home,
            env=os.environ | {"HOME": str(home), "FAKE_TRAIN_EXIT": exits[int(home.name)]},
        )
        for home in reachable(cloud)
    ]


STEPS = {
    "queued-resources create": create,
    "queued-resources describe": describe_request,
    "queued-resources delete": delete,
    "tpu-vm describe": lambda cloud: print(cloud["node"]),
    "tpu-vm scp": scp,
    "tpu-vm ssh": ssh,
}


def main():
    with open(CLOUD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(CLOUD / "calls.jsonl", "a") as calls:
            calls.write(json.dumps(ARGUMENTS) + "\n")
        cloud = json.loads((CLOUD / "cloud.json").read_text())
        processes = []
        try:
            fail_on_purpose(cloud, late=False)
            processes = STEPS[" ".join(ARGUMENTS[2:4])](cloud) or []
            fail_on_purpose(cloud, late=True)
        except Failure as failure:
            print(failure, file=sys.stderr)
            return failure.code
        finally:
            (CLOUD / "cloud.json").write_text(json.dumps(cloud))
    return max([process.wait() for process in processes], default=0)


if __name__ == "__main__":
    sys.exit(main())
