"""A real SLURM of two nodes on this machine: its daemons, and jobs submitted to it.

Debian's packages slurm-wlm and munge have what it needs; nothing of the machine's own configuration
is read or changed.
"""

import faulthandler
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
# Processes of a job find each other by the names of nodes: addresses need no name server.
NODES = ("127.0.0.2", "127.0.0.3")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser={user}
SlurmdUser={user}
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=8000\n"


def missing():
    """The programs of SLURM that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Slurm:
    """`checkout` is a folder to submit from: launch/ and a .venv, as links."""

    def __init__(self, folder: Path):
        self.folder, self.checkout = folder, folder / "a checkout"
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        self._daemons = []
        self.checkout.mkdir()
        (self.checkout / "launch").symlink_to(ROOT / "launch")
        (self.checkout / ".venv").symlink_to(sys.prefix)

    def start(self):
        """Returns when both nodes wait for work."""
        host, user = socket.gethostname().partition(".")[0], subprocess.getoutput("id -un")
        folder = self.folder
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        conf = CONF.format(host=host, port=free_port(), folder=folder, user=user)
        for node in NODES:
            conf += NODE.format(name=node, host=host, port=free_port())
        (folder / "slurm.conf").write_text(conf)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        own = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in files]
        self._daemon("munged", "--foreground", "--force", *own)
        self._wait(lambda: (folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        self._wait(lambda: not self.call("scontrol", "ping", check=False).returncode)
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.call("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"])

    def _daemon(self, *command):
        with open(self.folder / f"{command[0]}.log", "a") as log:
            self._daemons.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
            )

    def _wait(self, ready, seconds=60):
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"SLURM does not start; see {self.folder}/*.log"
            time.sleep(0.2)

    def stop(self):
        """Ends all jobs and the daemons."""
        self.call("scancel", "--signal=KILL", "--full", "--state=RUNNING", check=False)
        self.call("scancel", "--state=PENDING", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=60)

    def call(self, *command, check=True, **more):
        return subprocess.run(
            command, env=self.environment | more, cwd=self.checkout, check=check,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def submit(self, *arguments, options=(), **more):
        """`sbatch launch/slurm.sbatch ARGUMENTS` on both nodes; returns the job's number."""
        command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", *options]
        command += ["launch/slurm.sbatch", *map(str, arguments)]
        return self.call(*command, **more).stdout.strip()

    def job(self, number):
        """What SLURM knows of a job: {name: value}."""
        shown = self.call("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def log(self, number):
        path = self.checkout / f"stablelm-{number}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, number, ready, seconds=600):
        """Returns what SLURM knows of the job when `ready(that)`."""
        # SLURM lets a job wait for two minutes before it runs again: longer than pytest does.
        faulthandler.cancel_dump_traceback_later()
        deadline = time.monotonic() + seconds
        while not ready(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job}\n{self.log(number)}"
            time.sleep(1)
        return job

    def ended(self, number, seconds=600):
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return self.wait_for(number, lambda job: job["JobState"] in over, seconds)
