"""launch/tpu_pod.sh with a gcloud that takes notes, fails on purpose and runs what ssh would run.

fake_gcloud.py holds the cloud, fake_python.py trains.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = Path(sys.executable)
CONFIG = "configs/a.py"
# A disk of its own for every path with "shared" in it.
DF = '#!/bin/sh\ncase "$2" in *shared*) echo server:/disk ;; *) echo /dev/root ;; esac\n'
HOSTNAME = '#!/bin/sh\necho "worker-${HOME##*/}"\n'


# The installation takes eight calls of Python: a shell is quicker than a Python that pretends.
PYTHON3 = f"""#!/bin/sh
case "$1 $2" in
"-c "*) echo 3.12.0 ;;
"-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
"-m pip") [ "$3" != --version ] || exit 0
    shift && printf '["%s"]\\n' "$(echo "$@" | sed 's/ /", "/g')" >>"$FAKE_LOG" ;;
*) exec "{PYTHON}" -S "{HERE / "fake_python.py"}" "$@" ;;
esac
"""


class Pod:
    """A checkout under git, a cloud with one worker a slice, and ways to call the script."""

    def __init__(self, checkout, folder):
        self.checkout = checkout
        self.folder = folder / "cloud"
        self.workdir = folder / "a shared disk" / "run"
        self.folder.mkdir()
        (checkout.root / "configs").mkdir()
        (checkout.root / CONFIG).write_text("# a config\n")
        for command in ("init -q", "add .", "-c user.name=a -c user.email=b commit -qm first"):
            self.git(*command.split())
        fake = f'#!/bin/sh\nexec "{PYTHON}" -S "{HERE / "fake_gcloud.py"}" "$@"\n'
        for name, text in (
            ("gcloud", fake), ("python3", PYTHON3), ("df", DF), ("hostname", HOSTNAME),
        ):  # fmt: skip
            checkout.add_program(name, text)
        nothing = {"request": None, "node": None, "queue": [], "exits": [], "failures": []}
        (self.folder / "cloud.json").write_text(json.dumps({**nothing, "slices": 0, "workers": 1}))

    def git(self, *arguments):
        subprocess.run(["git", *arguments], cwd=self.checkout.root, check=True)

    def set(self, **changes):
        """Between two calls of gcloud, as that is locked too."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cloud = json.loads((self.folder / "cloud.json").read_text())
            (self.folder / "cloud.json").write_text(json.dumps(cloud | changes))
            return cloud | changes

    @property
    def cloud(self):
        return self.set()

    def command(self, verb, *arguments):
        given = ["--name", "mine", "--zone", "here-a"]
        if verb == "run":
            given += ["--accelerator-type", "v5p-16", "--config", CONFIG]
            given += ["--workdir", str(self.workdir)]
        return self.checkout.command("launch/tpu_pod.sh", verb, *given, *arguments)

    def start(self, *arguments):
        return subprocess.Popen(
            self.command(*arguments), cwd=self.checkout.elsewhere, start_new_session=True,
            env=self.checkout.environment(
                FAKE_CLOUD=str(self.folder), TPU_POD_PAUSE="0", TPU_POD_SECOND="0.05"
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def call(self, *arguments):
        """The exit code, what it said, and the errors."""
        return ended(self.start(*arguments))

    def calls(self, part=""):
        """The calls of gcloud with `part` in them, without what all have in common."""
        if not (self.folder / "calls.jsonl").exists():
            return []
        every = map(json.loads, (self.folder / "calls.jsonl").read_text().splitlines())
        return [call for call in every if part in " ".join(call)]

    def steps(self):
        """What changes something, in order."""
        names = ("create", "delete", "scp", "prepare", "start", "stop")
        found = []
        for call in self.calls():
            words = shlex.split(" ".join(call[2:]).replace("--command=", ""))
            found += [name for name in names if name in words]
        return found

    def workers(self):
        return sorted(self.folder.glob(f"slice{self.cloud['slices']}/*/stablelm_pod"))

    def wait_for_trainings(self, script, count=1):
        for _ in range(1500):
            log = self.checkout.log
            if log.exists() and self.checkout.calls().count(["training"]) >= count:
                return
            assert script.poll() is None, script.communicate()
            time.sleep(0.02)
        raise AssertionError("no training in 30 s")

    def kill_trainings(self):
        for home in self.folder.glob("slice*/*/stablelm_pod/pid"):
            subprocess.run(["kill", "-KILL", home.read_text().strip()], stderr=subprocess.DEVNULL)


def ended(script):
    try:
        out, err = script.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)
        raise
    return script.returncode, out, err


@pytest.fixture
def pod(checkout, tmp_path):
    made = Pod(checkout, tmp_path)
    yield made
    made.kill_trainings()


FIRST_TIME = ["create", "scp", "prepare", "start"]


def test_it_asks_for_a_slice_installs_trains_on_every_worker_and_shows_the_log(pod):
    pod.set(workers=2, queue=["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"])
    code, out, err = pod.call("run", "--spot", "--config.name=it's a name", "--config.seed=3")
    assert code == 0, err
    assert pod.steps() == FIRST_TIME
    for state in ("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"):
        assert f"mine is {state}\n" in out
    trained = ["--workdir", str(pod.workdir), "--config", CONFIG]
    trained += ["--config.name=it's a name", "--config.seed=3"]
    assert pod.checkout.calls("stablelm_jax.train") == [trained] * 2
    tpu = ["--requirement", "requirements.txt", "--editable", ".[tpu,gcs]"]
    assert pod.checkout.installed() == [tpu] * 2
    assert "the training ended with exit code 0" in out
    assert "still exists and costs money" in err and "delete --name mine --zone here-a" in err


def test_a_dry_run_prints_the_same_commands_in_the_same_order_and_calls_nothing(pod):
    options = ("--spot", "--project", "p", "--service-account=s@p", "--internal-ip",
               "--create-flag=--valid-until-duration=6h", "--delete-after",
               "--config.name=it's a name")  # fmt: skip
    code, out, err = pod.call("run", "--dry-run", *options)
    assert (code, err) == (0, "") and not pod.calls()
    printed = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("gcloud")]
    assert pod.call("run", *options)[0] == 0
    called = []
    for call in pod.calls():
        call = ["/tmp/tpu_pod/stablelm_pod" if "stablelm_pod" in a[-13:] else a for a in call]
        if call not in called:
            called.append(call)
    follow = [call for call in called if "follow" in call[-5]]
    without = [call for call in called if call not in follow]
    assert [c for c in without if c in printed] == without
    assert [c for i, c in enumerate(printed) if c not in printed[:i] and c not in follow] == without
    assert pod.calls(" create ")[0][4:] == [
        "mine", "--node-id=mine", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5",
        "--spot", "--internal-ips", "--service-account=s@p", "--valid-until-duration=6h",
        "--zone=here-a", "--project=p", "--quiet",
    ]  # fmt: skip


def test_the_code_is_the_committed_one_with_tracked_changes(pod):
    (pod.checkout.root / CONFIG).write_text("# changed\n")
    (pod.checkout.root / "new.py").write_text("# added\n")
    pod.git("add", "new.py")
    (pod.checkout.root / "untracked.py").write_text("# mine alone\n")
    code, _, err = pod.call("run")
    assert code == 0, err
    for worker in pod.workers():
        assert (worker / "code" / CONFIG).read_text() == "# changed\n"
        assert (worker / "code" / "new.py").exists()
        assert not (worker / "code" / "untracked.py").exists()
    assert "not copied" in err and "untracked.py" in err
    left = subprocess.run(["git", "stash", "list"], cwd=pod.checkout.root, capture_output=True)
    assert not left.stdout


def test_what_may_pass_is_tried_again(pod):
    parts = ("describe mine", " create ", " scp ", "prepare", "start", "worker.sh result; else")
    pod.set(failures=[{"match": part, "times": 1} for part in parts])
    code, _, err = pod.call("run")
    assert code == 0, err
    assert "(attempt 1 of 5)" in err
    assert pod.steps() == [step for step in FIRST_TIME for _ in range(2)]


def test_what_was_done_though_its_answer_got_lost_is_not_done_twice(pod):
    pod.set(failures=[{"match": part, "times": 1, "late": True} for part in (" create ", "start")])
    code, _, err = pod.call("run")
    assert code == 0, err
    assert pod.steps() == ["create", "create", "scp", "prepare", "start", "start"]
    assert pod.cloud["slices"] == 1


def test_it_gives_up_after_five_attempts_and_says_what_remains(pod):
    pod.set(failures=[{"match": " scp ", "times": 9, "message": "ERROR: no route to host"}])
    code, _, err = pod.call("run")
    assert code == 1 and err.count("no route to host") == 5
    assert "could not be started" in err and "costs money" in err


def test_a_denied_request_is_told_at_once_and_nothing_is_said_to_cost_money(pod):
    message = "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProject' has been exceeded"
    pod.set(failures=[{"match": " create ", "times": 9, "message": message}])
    code, _, err = pod.call("run")
    assert code == 1 and message in err and "could not create mine" in err
    assert pod.steps() == ["create"] and "costs money" not in err


def test_a_request_that_fails_in_the_queue_is_shown_and_made_anew_by_the_next_call(pod):
    pod.set(queue=["WAITING_FOR_RESOURCES", "FAILED"])
    code, _, err = pod.call("run")
    assert code == 1 and "the request for mine failed" in err
    assert pod.calls("yaml(state)")
    pod.set(queue=[])
    assert pod.call("run")[0] == 0
    assert pod.steps() == ["create", "delete", *FIRST_TIME]


def test_after_a_preemption_it_asks_again_and_goes_on(pod):
    pod.set(workers=2, exits=[["signal", "signal"], ["0", "0"]])
    script = pod.start("run", "--spot")
    pod.wait_for_trainings(script, count=2)
    pod.set(node="PREEMPTED")
    code, out, err = ended(script)
    assert code == 0, err
    assert pod.steps() == [*FIRST_TIME, "delete", *FIRST_TIME]
    assert "going on from the last checkpoint" in out


def test_preempted_while_it_installs(pod):
    pod.set(failures=[{"match": "prepare", "times": 1, "preempt": True, "message": "lost"}])
    code, _, err = pod.call("run")
    assert code == 0, err
    assert pod.steps() == ["create", "scp", "prepare", "prepare", "delete", *FIRST_TIME]


def test_stopped_with_a_checkpoint_on_a_slice_that_stays_it_goes_on_there(pod):
    pod.set(exits=[["75"], ["0"]])
    assert pod.call("run")[0] == 0
    assert pod.steps() == [*FIRST_TIME, "scp", "prepare", "start"]
    installed = pod.checkout.installed()
    assert len(installed) == 1, "nothing has changed on it"


def test_the_number_of_restarts_is_bounded(pod):
    pod.set(exits=[["75"]] * 9)
    code, _, err = pod.call("run", "--max-restarts", "1")
    assert code == 1 and "1 restarts were not enough" in err
    assert pod.steps().count("start") == 2


def test_each_start_after_the_first_asks_whether_there_is_progress(pod):
    pod.set(workers=2, exits=[["75", "75"], ["75", "75"], ["0", "0"]])
    assert pod.call("run")[0] == 0
    asked = pod.checkout.calls("launch/restarts.py")
    assert [(workdir, number) for workdir, _, number in asked] == [
        (str(pod.workdir), "1"), (str(pod.workdir), "2"),
    ]  # fmt: skip
    assert len({launch for _, launch, _ in asked}) == 1, "one launch, on worker 0 alone"


def test_without_progress_it_is_not_started_again(pod):
    """restarts.py says no: nobody asks it a second time, and nothing is started."""
    refusing = 'import sys; print("error: 5 starts in a row", file=sys.stderr); sys.exit(1)'
    (pod.checkout.root / "launch" / "restarts.py").write_text(refusing)
    pod.git("add", ".")
    real = f'"launch/restarts.py "*) exec "{PYTHON}" "$@" ;;\n*) exec'
    pod.checkout.add_program("python3", PYTHON3.replace("*) exec", real))
    pod.set(exits=[["75"], ["0"]])
    code, _, err = pod.call("run")
    assert code == 1 and err.count("5 starts in a row") == 1
    assert "could not be started" in err and pod.steps().count("start") == 1


def test_one_worker_that_was_killed_is_started_again_with_the_others(pod):
    pod.set(workers=2, exits=[["signal", "137"], ["75", "134"], ["0", "0"]])
    code, out, err = pod.call("run")
    assert code == 0, err
    assert "others hang: stopping those" in out and pod.steps().count("start") == 3


@pytest.mark.parametrize(
    "exits, code", [(["137", "137"], 137), (["137", "1"], 1), (["75", "2"], 2)]
)
def test_all_killed_or_an_error_beside_a_kill_is_how_it_ends(pod, exits, code):
    pod.set(workers=2, exits=[exits])
    assert pod.call("run")[0] == code
    assert pod.steps().count("start") == 1


@pytest.mark.parametrize("status", [1, 2])
def test_an_error_of_one_worker_ends_the_others_that_hang_and_is_handed_on(pod, status):
    pod.set(workers=2, exits=[["signal", str(status)]])
    code, out, err = pod.call("run")
    assert code == status
    assert "others hang: stopping those" in out and pod.steps()[-1] == "stop"
    assert f"worker-1 {status}, the end of its log" in err
    assert pod.cloud["node"] == "READY" and "costs money" in err


def test_an_error_when_the_slice_is_being_taken_away_is_no_error_of_the_training(pod):
    pod.set(exits=[["1"], ["0"]])
    script = pod.start("run")
    while not pod.calls("worker.sh start") and script.poll() is None:
        time.sleep(0.01)
    pod.set(node="PREEMPTED")
    assert ended(script)[0] == 0
    assert pod.steps()[-5:] == ["delete", *FIRST_TIME]


def test_called_again_it_follows_the_training_that_runs_and_copies_nothing(pod):
    pod.set(exits=[["signal"]])
    first = pod.start("run")
    pod.wait_for_trainings(first)
    os.killpg(first.pid, signal.SIGINT)
    code, _, err = ended(first)
    assert code == 130 and "a training on it goes on" in err
    second = pod.start("run")
    for line in second.stdout:
        if "runs on mine already" in line:
            break
    for worker in pod.workers():
        os.kill(int((worker / "pid").read_text()), signal.SIGKILL)
    code, _, err = ended(second)
    assert code == 137, err
    assert pod.steps() == FIRST_TIME


def test_ctrl_c_in_the_queue_says_what_may_cost_money_or_deletes_it(pod):
    for options, remains in ((), "WAITING_FOR_RESOURCES"), (("--delete-after",), None):
        pod.set(request=None, queue=["WAITING_FOR_RESOURCES"] * 10_000)
        script = pod.start("run", *options)
        for line in script.stdout:
            if "WAITING" in line:
                break
        os.killpg(script.pid, signal.SIGINT)
        code, _, err = ended(script)
        assert code == 130
        assert pod.cloud["request"] == remains
        assert ("costs money" in err) == bool(remains)


def test_ctrl_c_while_the_workers_install_says_what_costs_money(pod):
    setup = pod.checkout.elsewhere / "setup.sh"
    setup.write_text("echo mounting; sleep 20\n")
    script = pod.start("run", "--setup", str(setup))
    for line in script.stdout:
        if "mounting" in line:
            break
    os.killpg(script.pid, signal.SIGINT)
    code, _, err = ended(script)
    assert code == 130 and "costs money. Call this again" in err


@pytest.mark.parametrize("status", ["0", "1"])
def test_delete_after_deletes_however_the_training_ended(pod, status):
    pod.set(exits=[[status]])
    code, _, err = pod.call("run", "--delete-after")
    assert code == int(status) and pod.cloud["request"] is None
    assert "costs money" not in err


def test_the_setup_script_runs_on_each_worker_before_the_installation(pod):
    setup = pod.checkout.elsewhere / "mount disk.sh"
    setup.write_text('echo "mounted on $(hostname)"\n')
    code, out, err = pod.call("run", "--setup", str(setup))
    assert code == 0, err
    assert out.index("mounted on worker-0") < out.index("Making .venv")


def test_where_python_is_too_old_uv_brings_another(pod):
    too_old = pod.checkout.programs / "python3"
    new = pod.checkout.elsewhere / "new python"
    too_old.rename(new)
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        pod.checkout.add_program(
            name,
            f"""#!/bin/sh
            case "$*" in
            "-m uv python find 3.12") echo '{new}' ;;
            "-m pip install --quiet --user uv" | "-m uv --quiet python install 3.12") ;;
            *) exit 1 ;;
            esac""",
        )
    code, _, err = pod.call("run")
    assert code == 0, err
    assert (pod.workers()[0] / "code/.venv/bin/python").read_text() == new.read_text()


def test_a_workdir_in_a_bucket_is_the_trainings_own_affair(pod):
    pod.workdir = "gs://bucket/run"
    code, _, err = pod.call("run")
    assert code == 0, err
    (trained,) = pod.checkout.calls("stablelm_jax.train")
    assert trained[:2] == ["--workdir", "gs://bucket/run"]


def test_a_workdir_on_the_workers_own_disk_is_refused_by_the_workers(pod):
    pod.workdir = pod.folder.parent / "own disk"
    code, _, err = pod.call("run")
    assert code == 1 and "lies on this machine's own disk" in err
    assert pod.steps() == FIRST_TIME, "refused once, not five times"


def test_status_logs_and_delete(pod):
    assert pod.call("status")[1].strip() == "ABSENT"
    assert pod.call("delete")[0] == 0, "nothing to delete is no error"
    assert pod.call("run")[0] == 0
    assert pod.call("status")[1].split("\n")[:2] == ["READY", "stablelm_pod worker-0 0"]
    assert "ended with exit code 0" in pod.call("logs")[1]
    assert pod.call("delete")[0] == 0 and pod.cloud["request"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workdir", "gs://bucket"], "gs://BUCKET/FOLDER"),
        (["--workdir", "runs/a"], "from the root"),
        (["--config", "configs/none.py"], "no file that git tracks"),
        (["--accelerator-type", "v9-8"], "name --runtime-version"),
        (["--name", "My_Pod"], "lower-case"),
        (["--wrokdir", "/x"], "unknown argument '--wrokdir'"),
        (["--config.training.num_steps", "3"], "=VALUE"),
        (["--setup", "none.sh"], "no such file"),
        (["--zone="], "--zone is missing"),
    ],
)
def test_wrong_arguments_are_refused_before_gcloud_is_called(pod, arguments, said):
    code, _, err = pod.call("run", *arguments)
    assert code == 2 and said in err, err
    assert not pod.calls()
