"""What starts a run: train.sh on one and on two "nodes", the Slurm script with Slurm's commands stubbed, the manifest."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flame_ext.run.signals import EXIT_PREEMPTED
from tests.ranks import REPOSITORY, free_port, train

SCRIPTS = [
    *REPOSITORY.glob("*.sh"), *REPOSITORY.glob("configs/slurm/*"), *REPOSITORY.glob("docs/**/*.sh"), REPOSITORY / ".ci" / "run",
]  # fmt: skip
AWKWARD = ['--job.description=it\'s a "test" of  two spaces, $HOME and *', "--a", ""]
FAST = ("--training.seq_len=32", "--seed.verify=none", "--training.steps=2", "--checkpoint.no-last_save_in_hf",
        "--metrics.no-enable_tensorboard")  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}


def stub(folder: Path, name: str, body: str) -> Path:
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, "--shell=bash", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_two_nodes_compute_what_one_process_does(tmp_path: Path) -> None:
    """Two torchrun agents with a c10d rendezvous on loopback."""
    dump_folder = tmp_path / "two"
    description = AWKWARD[0]
    shared = environment(
        NNODE="2", NGPU="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RDZV_ID=tmp_path.name
    )
    command = ["./train.sh", *FAST, f"--job.dump_folder={dump_folder}", description]
    command += ["--training.local_batch_size=2", "--training.global_batch_size=4"]
    nodes = [
        subprocess.Popen(
            command, cwd=REPOSITORY, env={**shared, "NODE_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(output[-2000:] for output in outputs)
    assert description.removeprefix("--job.description=") in outputs[0]
    two = [json.loads(line) for line in (dump_folder / "metrics.jsonl").read_text().splitlines()]
    one = train(tmp_path / "one", *FAST, "--training.local_batch_size=4")
    assert len(two) == len(one.metrics) == 2
    for name in ("loss", "loss_ce", "loss_future", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx(one.values(name), rel=1e-5), name
    manifest = json.loads((dump_folder / "checkpoint" / "step-2" / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["parallelism"] == {
        "dp_replicate": 1,
        "dp_shard": 2,
        "cp": 1,
        "tp": 1,
        "pp": 1,
        "ep": 1,
    }


def test_arguments_pass_through_train_sh_unharmed(tmp_path: Path) -> None:
    python = stub(tmp_path, "python", f'printf "%s\\0" "$@" > {shlex.quote(str(tmp_path / "arguments"))}')
    subprocess.run(["./train.sh", *AWKWARD], cwd=REPOSITORY, env=environment(PYTHON=str(python), NGPU="1"), check=True)
    arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
    assert arguments[-len(AWKWARD) :] == AWKWARD and "flame_ext.train" in arguments


def test_the_environment_says_where_and_how_many(tmp_path: Path) -> None:
    python = stub(tmp_path, "python", f'printf "%s\\0" "$@" > {shlex.quote(str(tmp_path / "arguments"))}')

    def given(**variables: str) -> list[str]:
        subprocess.run(["./train.sh"], cwd=REPOSITORY, env=environment(PYTHON=str(python), **variables), check=True)
        return (tmp_path / "arguments").read_text().split("\0")[:-1]

    def after(arguments: list[str], option: str) -> str:
        return arguments[arguments.index(option) + 1]

    alone = given(NGPU="3")
    assert "--standalone" in alone and after(alone, "--nnodes") == "1" and after(alone, "--nproc_per_node") == "3"
    assert after(alone, "--job.config_file") == "configs/debug.toml" and after(alone, "--local_ranks_filter") == "0"
    second = given(NGPU="1", NNODE="2", NODE_RANK="1", MASTER_ADDR="first", MASTER_PORT="1234", RDZV_ID="job 7",
                   CONFIG_FILE="my own.toml", LOG_RANK="0,1")  # fmt: skip
    expected = {"--nnodes": "2", "--node_rank": "1", "--rdzv_endpoint": "first:1234", "--rdzv_id": "job 7",
                "--rdzv_backend": "c10d", "--job.config_file": "my own.toml", "--local_ranks_filter": "0,1"}  # fmt: skip
    assert {option: after(second, option) for option in expected} == expected and "--standalone" not in second
    assert "--node_rank" not in given(NGPU="1", NNODE="2", MASTER_ADDR="first")
    with pytest.raises(subprocess.CalledProcessError):
        given(NGPU="1", NNODE="2", MASTER_ADDR="")


@pytest.mark.parametrize(("code", "given"), [(0, "0"), (1, "1"), (2, "2"), (75, "1")])
def test_exit_codes_are_kept(tmp_path: Path, code: int, given: str) -> None:
    """torchrun answers every failure with 1; what a rank has left in the file is what counts."""
    leave = f'echo {code} > "$FLAME_EXT_EXIT_FILE"' if str(code) != given else ":"
    python = stub(tmp_path, "python", f"{leave}\nexit {given}")
    run = subprocess.run(["./train.sh"], cwd=REPOSITORY, env=environment(PYTHON=str(python), NGPU="1"))
    assert run.returncode == code


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Slurm's commands: srun runs the command here, as the only node; scontrol writes down what it is asked."""
    place = tmp_path / "bin"
    place.mkdir()
    stub(place, "srun", f'shift\nSLURM_NODEID=0 exec "$@" > {shlex.quote(str(tmp_path / "srun.log"))}')
    log = shlex.quote(str(tmp_path / "scontrol.log"))
    stub(place, "scontrol", f'echo "$@" >> {log}\n[[ $1 == show ]] && echo node-1 && exit\n[[ $1 == requeue ]]')
    return place


def sbatch(
    slurm: Path, train_sh: str, script: str = "train.sbatch", *before: str, **more: str
) -> subprocess.Popen[str]:
    """A batch script in a folder whose train.sh is a stub."""
    root = slurm.parent / "root"
    shutil.copytree(REPOSITORY / "configs" / "slurm", root / "configs" / "slurm")
    stub(root, "train.sh", train_sh)
    slurm_environment = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "4321", "SLURM_JOB_NODELIST": "node-[1-2]", **more}
    # As Slurm does, from a copy that lies elsewhere.
    spooled = shutil.copy(root / "configs" / "slurm" / script, slurm.parent / "slurm_script")
    return subprocess.Popen(
        ["bash", spooled, *before, *AWKWARD],
        cwd=root, env=environment(PATH=f"{slurm}:{os.environ['PATH']}", SLURM_SUBMIT_DIR=str(root), **slurm_environment),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_requeues_what_was_preempted_and_nothing_else(slurm: Path, code: int, requeued: bool) -> None:
    job = sbatch(slurm, f'printf "%s\\0" "$@" > arguments; env > environment; exit {code}')
    assert job.wait(timeout=30) == code
    assert ("requeue 4321" in (slurm.parent / "scontrol.log").read_text()) == requeued
    root = slurm.parent / "root"
    assert (root / "arguments").read_text().split("\0")[:-1] == AWKWARD
    given = dict(line.split("=", 1) for line in (root / "environment").read_text().splitlines() if "=" in line)
    assert given["MASTER_ADDR"] == "node-1" and given["NNODE"] == "1" and given["NODE_RANK"] == "0"
    assert given["CONFIG_FILE"] == "configs/olmo1b_fp.toml" and 20000 <= int(given["MASTER_PORT"]) < 40000


def test_slurm_hands_the_signal_on(slurm: Path) -> None:
    job = sbatch(slurm, "trap 'exit 75' USR1; touch ready; while :; do sleep 0.1; done")
    ready, deadline = slurm.parent / "root" / "ready", time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 75
    assert "requeue 4321" in (slurm.parent / "scontrol.log").read_text()


SWEEP = """--optimizer.lr=1e-3
--optimizer.lr=1e-4 '--job.description=two  words, $HOME and "quotes"' --data.rng_seed=1

# no job
"""


def test_a_sweep_is_a_job_for_each_line(slurm: Path) -> None:
    file = slurm.parent / "lr and seeds.v2.txt"
    file.write_text(SWEEP)
    stub_of_run = 'printf "%s\\0" "$@" > arguments; exit 75'
    job = sbatch(slurm, stub_of_run, "sweep.sbatch", str(file), SLURM_ARRAY_TASK_ID="2", CONFIG_FILE="mine.toml")
    assert job.wait(timeout=30) == 75 and "requeue 4321" in (slurm.parent / "scontrol.log").read_text()
    arguments = (slurm.parent / "root" / "arguments").read_text().split("\0")[:-1]
    of_line = ["--optimizer.lr=1e-4", '--job.description=two  words, $HOME and "quotes"', "--data.rng_seed=1"]
    assert arguments == ["--job.dump_folder=outputs/sweeps/lr and seeds.v2/2", *of_line, *AWKWARD]


@pytest.mark.parametrize("number", ["3", "4", "9"])
def test_a_line_without_options_is_an_error(slurm: Path, number: str) -> None:
    file = slurm.parent / "sweep.txt"
    file.write_text(SWEEP)
    job = sbatch(slurm, "touch started", "sweep.sbatch", str(file), SLURM_ARRAY_TASK_ID=number)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and f"error: line {number} of {file} has no options" in output
    assert not (slurm.parent / "root" / "started").exists() and not (slurm.parent / "scontrol.log").exists()


def test_quotes_that_do_not_end_are_an_error(slurm: Path) -> None:
    file = slurm.parent / "sweep.txt"
    file.write_text("--job.description='open\n")
    job = sbatch(slurm, "touch started", "sweep.sbatch", str(file), SLURM_ARRAY_TASK_ID="1")
    assert job.wait(timeout=30) not in (0, 75) and not (slurm.parent / "root" / "started").exists()


def test_the_sweep_s_signal_reaches_the_run(slurm: Path) -> None:
    file = slurm.parent / "sweep.txt"
    file.write_text(SWEEP)
    train_sh = "trap 'exit 75' USR1; touch ready; while :; do sleep 0.1; done"
    job = sbatch(slurm, train_sh, "sweep.sbatch", str(file), SLURM_ARRAY_TASK_ID="1")
    ready, deadline = slurm.parent / "root" / "ready", time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 75


def test_skypilot_starts_the_same_script_and_again_after_75(tmp_path: Path) -> None:
    task = yaml.safe_load((REPOSITORY / "configs" / "skypilot" / "train.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_PREEMPTED]
    assert (REPOSITORY / task["envs"]["CONFIG_FILE"]).is_file()
    assert "/outputs" in task["file_mounts"]
    stub(tmp_path, "train.sh", 'echo "$NNODE $NODE_RANK $NGPU $MASTER_ADDR $CONFIG_FILE $*"')
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    given |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": os.environ["PATH"], **task["envs"]}
    run = subprocess.run(
        ["bash", "-e", "-c", task["run"]], cwd=tmp_path, env=given, capture_output=True, text=True, check=True
    )
    assert run.stdout == "2 1 8 10.0.0.1 configs/olmo1b_fp.toml --job.dump_folder=/outputs/run\n"


def test_the_kubernetes_manifest_starts_the_same_script() -> None:
    job = yaml.safe_load((REPOSITORY / "configs" / "kubernetes" / "pytorchjob.yaml").read_text())
    assert job["kind"] == "PyTorchJob"
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch" and replica["restartPolicy"] == "OnFailure"
        assert container["command"] == ["bash", "-c"] and 'exec ./train.sh "$@"' in container["args"][0]
        run = subprocess.run(
            [*container["command"], container["args"][0].replace("exec ./train.sh", "printf '%s,'"), *container["args"][1:]],
            env={"WORLD_SIZE": "2", "RANK": "1", "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert run.stdout == "--job.dump_folder=/outputs/run,"
