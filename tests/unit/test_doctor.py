"""The doctor: what it says of broken surroundings, real ones where they can be made."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_dist.config import load_recipe
from sft_dist.data.prepare import open_or_prepare
from sft_dist.doctor import ask_directory, ask_training, topology
from sft_dist.doctor.environment import check_environment
from sft_dist.doctor.finding import Finding, Group, Verdict
from sft_dist.doctor.gpus import FIELDS, GROUP, gpu_findings, has_kernels, parse_gpus, torch_gpu_findings
from sft_dist.doctor.host import LIMITS, limit_finding, memlock_finding, shm_finding
from sft_dist.doctor.network import check_network
from sft_dist.doctor.places import place_finding
from sft_dist.doctor.probe import Answer, ask, ask_python
from sft_dist.doctor.recipe import check_recipe, needs_of, training_findings
from sft_dist.doctor.report import print_findings
from sft_dist.doctor.trial import all_reduce_finding, smoke_finding, try_all_reduce, try_smoke_run
from sft_dist.doctor.versions import flash_finding, torch_findings
from tests import tiny
from tests.unit.hub_server import serve
from tests.unit.wandb_server import wandb_server

ROOT = Path(__file__).parents[2]
CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "hip": None, "cxx11_abi": True, "devices": []}


def verdicts(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.verdict.value for finding in findings}


def answered(facts: dict[str, Any]) -> Answer:
    return Answer(0, json.dumps(facts), "", 0.1)


# Asking.


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """The grandchild has a session of its own, like a rank of torchrun: its group's end would not be its own."""
    pid_file = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open({str(pid_file)!r}, "w").write(str(child.pid))
print("began", flush=True)
time.sleep(60)
"""
    began = time.monotonic()
    answer = ask([sys.executable, "-c", code], timeout_s=1.5)
    assert time.monotonic() - began < 10
    assert (answer.code, answer.failure) == (None, "no answer within 1.5 s")
    assert answer.out == "began\n"
    grandchild, deadline = int(pid_file.read_text()), time.monotonic() + 5
    while _runs(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(grandchild)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_missing_dies_or_reads_is_an_answer_in_words() -> None:
    assert ask(["no-such-program"], timeout_s=5).failure == "no-such-program: No such file or directory"
    reads = ask([sys.executable, "-c", "print(repr(input()))"], timeout_s=20)
    assert reads.failure == "exit code 1: EOFError: EOF when reading a line", "stdin is closed: nobody waits for a key"
    dies = ask([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"], timeout_s=20)
    assert dies.failure == "died by SIGSEGV"
    says = ask([sys.executable, "-c", "import sys; print('error: the reason'); sys.exit(3)"], timeout_s=20)
    assert says.failure == "exit code 3: error: the reason"


# A machine that is broken in many ways at once, through the command.


def broken_packages(directory: Path) -> Path:
    """torch that cannot be imported, flash-attn of another ABI, and flash-attn-3 that kills its process."""
    for name, text in (
        ("torch", "raise ImportError('libcudart.so.13: cannot open shared object file')"),
        ("flash_attn", "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceE')"),
        ("flash_attn_interface", "import ctypes; ctypes.string_at(0)"),
    ):
        (directory / name).mkdir(parents=True)
        (directory / name / "__init__.py").write_text(text)
    return directory


def test_a_broken_machine_is_told_whole_and_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    fake = tmp_path / "bin"
    fake.mkdir()
    gpu = "0, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 40960, Default, Disabled"
    (fake / "nvidia-smi").write_text(f"#!/bin/sh\necho '{gpu}'\n")
    (fake / "nvidia-smi").chmod(0o755)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))} | {
            "PYTHONPATH": f"{broken_packages(tmp_path / 'packages')}:{ROOT}",
            "PATH": f"{fake}:{os.environ['PATH']}",
            "MASTER_PORT": str(taken.getsockname()[1]),
            "WORLD_SIZE": "8",
            "RANK": "3",
            "MASTER_ADDR": "node-0",
            "CUDA_VISIBLE_DEVICES": "",
            "CUDA_LAUNCH_BLOCKING": "1",
            "https_proxy": "http://somebody:hunter2-is-secret@proxy:3128",
            "HF_HOME": str(tmp_path / "runs" / "below-a-file"),
            "HOME": str(tmp_path),
        }
        command = [sys.executable, "-m", "sft_dist", "doctor", "--offline", "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=environ, timeout=120, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = {(each["group"], each["name"]): each for each in json.loads(done.stdout)["findings"]}
    expected = {
        ("versions", "torch"): ("problem", "libcudart.so.13: cannot open shared object file"),
        ("versions", "flash-attn"): ("warning", "undefined symbol"),
        ("versions", "flash-attn-3"): ("warning", "died by SIGSEGV"),
        ("attention", "attention"): ("problem", "libcudart.so.13"),
        ("GPUs", "GPU 0"): ("warning", "another process holds 40.0 GiB"),
        ("host", f"port {environ['MASTER_PORT']}"): ("problem", "something listens there already"),
        ("disk", "runs"): ("problem", "is not a directory"),
        ("disk", "hub cache"): ("problem", "is not a directory"),
        ("environment", "launcher"): ("problem", "would wait here for 7 others"),
        ("environment", "CUDA_VISIBLE_DEVICES"): ("warning", "hides all GPUs"),
        ("environment", "CUDA_LAUNCH_BLOCKING"): ("warning", "waits for every kernel"),
        ("environment", "https_proxy"): ("note", "somebody:***@proxy"),
    }
    for place, (verdict, words) in expected.items():
        assert found[place]["verdict"] == verdict, found[place]
        assert words in found[place]["seen"]
        assert found[place]["mend"]
    assert all(each["mend"] for each in found.values() if each["verdict"] != "ok")
    assert "hunter2" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not any(group == "trial" for group, _ in found), "without torch there is nothing to try"


def test_the_doctor_itself_never_loads_torch() -> None:
    """It has to be able to say that torch is broken."""
    code = """
import sys, sft_dist.doctor.examine, sft_dist.doctor.report
sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# Versions.


def test_a_wheel_for_another_torch_or_abi_is_named() -> None:
    torch = CPU_TORCH | {"version": "2.13.0+cu130", "cuda": "13.0", "devices": [{"name": "H100"}]}
    says = Answer(1, "", "", 0.1, "exit code 1: ImportError: undefined symbol")
    other = flash_finding("flash-attn", says, version="2.8.3+cu12torch2.8cxx11abiFALSE", torch=torch)
    assert other.verdict is Verdict.WARNING, "auto takes the next backend"
    assert "built for torch 2.8 and the old C++11 ABI and CUDA 12" in other.seen
    dead = flash_finding("flash-attn", Answer(-11, "", "", 0.1, "died by SIGSEGV"), version=None, torch=torch)
    assert dead.verdict is Verdict.PROBLEM, "auto would import it on a GPU, and die of it"
    right = answered({"version": "2.8.3", "has_attribute": True})
    fits = flash_finding("flash-attn", right, version="2.8.3+cu13torch2.13cxx11abiTRUE", torch=torch)
    assert fits.verdict is Verdict.OK
    assert (
        flash_finding("flash-attn", answered({"has_attribute": False}), version="4", torch=torch).verdict
        is Verdict.WARNING
    )


def test_torch_is_said_with_its_cuda_abi_and_nccl() -> None:
    facts = CPU_TORCH | {
        "version": "2.13.0+cu130",
        "cuda": "13.0",
        "nccl": [2, 28, 9],
        "cudnn": 91300,
        "distributed": False,
    }
    found = {finding.name: finding for finding in torch_findings(facts)}
    assert found["torch"].seen == "2.13.0+cu130, built for CUDA 13.0, with the new C++11 ABI"
    assert found["NCCL"].seen.startswith("2.28.9,")
    assert found["torch.distributed"].verdict is Verdict.PROBLEM


# GPUs: not seen on one, only from what nvidia-smi prints.

SWITCHED = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tNV18\tPIX\tSYS\t0-47,96-143\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNV18\tNODE\tSYS\t0-47,96-143\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNV18\tSYS\tPIX\t48-95,144-191\t1\t\tN/A
GPU3\tNV18\tNV18\tNV18\t X \tSYS\tNODE\t48-95,144-191\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\tSYS\t X \tSYS\t\t\t\t
NIC1\tSYS\tSYS\tPIX\tNODE\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""
SOCKETS = SWITCHED.replace("NV18", "SYS")
BRIDGED = """
        GPU0    GPU1    GPU2    GPU3    CPU Affinity    NUMA Affinity
GPU0     X      NV4     PXB     PXB     0-31            0
GPU1    NV4      X      PXB     PXB     0-31            0
GPU2    PXB     PXB      X      NV4     0-31            0
GPU3    PXB     PXB     NV4      X      0-31            0
"""


@pytest.mark.parametrize(
    ("text", "verdict", "words"),
    [
        (SWITCHED, "ok", "NVLink between all pairs of GPUs (NV18)"),
        (SOCKETS, "warning", "no NVLink; some pairs reach each other over SYS"),
        (BRIDGED, "note", "between GPUs 0-2, 0-3, 1-2, 1-3"),
        (BRIDGED.replace("NV4", "PXB"), "note", "no NVLink; PXB"),
    ],
)
def test_links_are_read_from_the_matrix(text: str, verdict: str, words: str) -> None:
    parsed = topology.parse_topology(text)
    assert parsed.num_gpus == 4
    assert len(parsed.links) == 6, "each pair once, and no network card among them"
    (finding,) = topology.link_findings(parsed, GROUP)
    assert finding.verdict.value == verdict
    assert words in finding.seen


def test_no_matrix_is_no_link() -> None:
    for text in (
        "",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        "\tGPU0\nGPU0\t X ",
    ):
        assert list(topology.link_findings(topology.parse_topology(text), GROUP)) == []


def test_gpus_that_are_taken_prohibited_or_sliced_are_named() -> None:
    text = (
        "0, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 1, Default, Disabled\n"
        "1, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 20480, Default, Disabled\n"
        "2, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 1, Prohibited, Disabled\n"
        "3, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 1, Default, Enabled\n"
        "4, NVIDIA GB10, 580.95.05, [N/A], [N/A], Default, [N/A]\n"
        "No devices were found\n"
    )
    listed = parse_gpus(text)
    assert [set(gpu) for gpu in listed] == [set(FIELDS)] * 5
    found = verdicts(gpu_findings(listed))
    assert found == {"GPU 0": "ok", "GPU 1": "warning", "GPU 2": "problem", "GPU 3": "note", "GPU 4": "note"}


def test_torch_without_the_drivers_gpus_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = CPU_TORCH | {"why_not": "The NVIDIA driver on your system is too old", "archs": []}
    assert verdicts(torch_gpu_findings(facts, driver_lists=8)) == {"torch": "problem"}
    assert verdicts(torch_gpu_findings(facts, driver_lists=None)) == {"torch": "note"}, (
        "a machine without GPUs is one to train on"
    )
    new = {"name": "B200", "capability": [10, 0], "free": 2**37, "total": 2**37}
    old = {"name": "V100", "capability": [7, 0], "free": 2**34, "total": 2**34}
    facts |= {
        "devices": [new, old, {"error": "CUDA-capable device(s) is/are busy"}],
        "archs": ["sm_70", "sm_80", "sm_90"],
    }
    found = verdicts(torch_gpu_findings(facts, driver_lists=3))
    assert found == {"torch, GPU 0": "problem", "torch, GPU 1": "warning", "torch, GPU 2": "problem"}


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 0), True),
        (["sm_80", "sm_90"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90a"], (9, 0), True),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "sm_90", "compute_90"], (10, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["compute_120"], (10, 0), False),
    ],
)
def test_kernels_run_on_gpus_that_they_were_built_for(
    archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    """By NVIDIA's rules of compatibility: binaries within a major version, PTX on anything later."""
    assert has_kernels(archs, *capability) is runs


# Host and disk.


def test_small_limits_are_said_with_the_command_that_raises_them() -> None:
    files = next(limit for limit in LIMITS if limit.flag == "-n")
    low = limit_finding(files, (1024, 524288))
    assert (low.verdict, low.mend) == (Verdict.NOTE, "ulimit -n 4096")
    assert "root" in limit_finding(files, (1024, 1024)).mend
    assert limit_finding(files, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)).verdict is Verdict.OK
    size = next(limit for limit in LIMITS if limit.flag == "-f")
    assert limit_finding(size, (10**9, resource.RLIM_INFINITY)).verdict is Verdict.WARNING, (
        "a shard above 1 GB is its end"
    )
    assert memlock_finding((65536, 65536), adapters=["mlx5_0"]).verdict is Verdict.WARNING
    assert memlock_finding((65536, 65536), adapters=[]).verdict is Verdict.OK


def test_no_shared_memory_is_a_problem(tmp_path: Path) -> None:
    assert shm_finding(tmp_path / "none", has_gpus=False).verdict is Verdict.PROBLEM


def test_a_place_is_tried_and_its_room_compared(tmp_path: Path) -> None:
    facts = ask_directory.facts(tmp_path / "not" / "there" / "yet")
    assert (facts["place"], facts["error"], facts["lock_error"]) == (str(tmp_path), None, None)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    name, path = "runs", tmp_path
    facts |= {"free": 10**10, "total": 10**11}
    assert place_finding(name, path, answered(facts), needed=9 * 10**9).verdict is Verdict.OK
    short = place_finding(name, path, answered(facts), needed=11 * 10**9)
    assert short.verdict is Verdict.PROBLEM
    assert "checkpoints and the model will take 11.0 GB" in short.seen
    for worse in ({"free": 10**9}, {"inodes_full": True}, {"lock_error": "No locks available"}):
        assert place_finding(name, path, answered(facts | worse)).verdict is not Verdict.OK
    hanging = Answer(None, "", "", 15.0, "no answer within 15 s")
    assert place_finding(name, path, hanging).verdict is Verdict.PROBLEM


# Environment.


@pytest.mark.parametrize(
    ("environ", "name", "verdict"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "launcher", "note"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "launcher", "problem"),
        ({"WORLD_SIZE": "2"}, "launcher", "problem"),
        ({"MASTER_ADDR": "10.0.0.1"}, "launcher", "note"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2"}, "SLURM", "note"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "MPI", "problem"),
        ({"PMI_SIZE": "1"}, "MPI", "note"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS", "problem"),
        ({"OMP_NUM_THREADS": "100000"}, "OMP_NUM_THREADS", "warning"),
        ({}, "OMP_NUM_THREADS", "note"),
        ({"NCCL_SOCKET_IFNAME": "=nowhere0"}, "NCCL_SOCKET_IFNAME", "problem"),
        ({"GLOO_SOCKET_IFNAME": "nowhere0"}, "GLOO_SOCKET_IFNAME", "problem"),
        ({"NCCL_SOCKET_IFNAME": "^docker0"}, "NCCL_SOCKET_IFNAME", None),
        ({"NCCL_SOCKET_IFNAME": "l"}, "NCCL_SOCKET_IFNAME", None),  # a prefix of lo
        ({"ACCELERATE_USE_CPU": "true"}, "ACCELERATE_USE_CPU", "note"),
        ({"ACCELERATE_USE_CPU": "false"}, "ACCELERATE_USE_CPU", None),
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate", "problem"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES", "warning"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "CUDA_VISIBLE_DEVICES", "note"),
        ({"CUDA_LAUNCH_BLOCKING": "0"}, "CUDA_LAUNCH_BLOCKING", None),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE", "note"),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, "TORCH_DISTRIBUTED_DEBUG", "warning"),
        ({"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE", "warning"),
        ({"NCCL_ALGO": "Ring"}, "NCCL_ALGO", "note"),
        ({"LD_LIBRARY_PATH": "/usr/local/cuda-11.8/lib64"}, "LD_LIBRARY_PATH", "note"),
        ({"LD_LIBRARY_PATH": "/opt/mine"}, "LD_LIBRARY_PATH", None),
        ({"PET_NNODES": "2"}, "PET_NNODES", "warning"),
    ],
)
def test_variables_that_bite(tmp_path: Path, environ: dict[str, str], name: str, verdict: str | None) -> None:
    found = verdicts(check_environment(environ | {"HF_HOME": str(tmp_path)}, has_gpus=True))
    assert found.get(name) == verdict
    quiet = {each for each in found.values() if each in ("warning", "problem")} == set()
    assert ("variables" in found) == quiet


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("distributed_type: MULTI_GPU\nnum_processes: 8\nnum_machines: 1\n", "note"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "problem"),  # starts one, in silence
        ("not a mapping", "problem"),
    ],
)
def test_accelerates_own_config_is_told(tmp_path: Path, text: str, verdict: str) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(text)
    found = verdicts(check_environment({"HF_HOME": str(tmp_path)}, has_gpus=False))
    assert found["accelerate config"] == verdict


# Network.


def test_hub_and_wandb_are_reached_or_not_and_no_key_is_shown(tmp_path: Path) -> None:
    key = "b" * 40
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {key}\n")
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "WANDB_")) and "proxy" not in name.lower()
    }
    plain["HOME"] = str(tmp_path)
    with serve({}) as hub, wandb_server() as wandb:
        there = plain | {"HF_ENDPOINT": hub.url, "WANDB_BASE_URL": f"http://127.0.0.1:{wandb.port}"}
        found = list(check_network(wants_wandb=True, environ=there))
        assert verdicts(iter(found)) == {"hub": "ok", "wandb": "ok"}
        assert hub.requests == ["HEAD /"], "one request, and no more"
        assert key not in str(found)
        (tmp_path / ".netrc").unlink()
        assert verdicts(check_network(wants_wandb=True, environ=there))["wandb"] == "warning"
    gone = {name: f"http://127.0.0.1:{tiny.free_port()}" for name in ("HF_ENDPOINT", "WANDB_BASE_URL")}
    found = list(check_network(wants_wandb=True, environ=plain | gone))
    assert verdicts(iter(found)) == {"hub": "note", "wandb": "note"}
    assert "--with-model" in found[0].mend
    assert "mode: offline" in found[1].mend
    (offline, _) = check_network(wants_wandb=False, environ=plain | gone | {"HF_HUB_OFFLINE": "1"})
    assert "not asked" in offline.seen


# A recipe.


def test_a_recipe_is_held_against_the_machine(
    tmp_path: Path, tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no accelerate config of the machine's
    path = tiny.write_recipe(tmp_path, tied_model, train={"keep_checkpoints": 3})
    whole = load_recipe(path)
    needs = needs_of(whole)
    assert needs.num_parameters is not None
    assert needs.num_bytes == needs.num_parameters * (4 * 12 + 4), "three, the one that is being written, and the model"
    found = verdicts(check_recipe(whole, needs))
    assert found == {"model": "ok", "data.train": "ok", "launch": "ok"}
    lacking = load_recipe(
        path,
        [
            "model.path=nobody/nothing",
            "data.train=none.jsonl",
            "data.chat_template=none.jinja",
            "train.engine=zero1",
            "train.deepspeed=no.json",
        ],
    )
    environ = {"HF_HUB_OFFLINE": "1"}
    found = verdicts(check_recipe(lacking, needs_of(lacking), environ))
    assert [found[name] for name in ("model", "data.train", "data.chat_template", "train.deepspeed")] == ["problem"] * 4
    for can_fetch in ({}, {"HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "false"}):
        assert verdicts(check_recipe(lacking, needs_of(lacking), can_fetch))["model"] == "note", "a run can download it"
    few = load_recipe(path, ["batch.examples=1"])
    assert verdicts(check_recipe(few, needs_of(few)))["launch"] == "ok"


def test_checkpoints_that_are_kept_for_ever_count_for_the_disk(tmp_path: Path, tied_model: Path) -> None:
    train = {"keep_checkpoints": 1, "keep_every": 2, "save_every": 1, "steps": 9}
    path = tiny.write_recipe(tmp_path, tied_model, train=train)
    recipe = load_recipe(path)
    needs = needs_of(recipe)
    assert needs.num_parameters is not None
    assert needs.num_bytes == needs.num_parameters * ((1 + 4 + 1) * 12 + 4), "at steps 2, 4, 6 and 8"
    assert "train.keep_every" not in verdicts(check_recipe(recipe, needs))
    epochs = load_recipe(path, ["train.steps=null", "train.epochs=3"])
    assert verdicts(check_recipe(epochs, needs_of(epochs)))["train.keep_every"] == "note"
    store = open_or_prepare(epochs, epochs.data.train, console=Console(quiet=True))
    needs, kept = needs_of(epochs), 3 * -(-len(store) // 8) // 2
    assert needs.num_bytes == needs.num_parameters * ((1 + kept + 1) * 12 + 4)
    assert "train.keep_every" not in verdicts(check_recipe(epochs, needs))


def test_attention_of_a_recipe_is_tried_and_a_refusal_told(tmp_path: Path, tied_model: Path) -> None:
    path = str(tiny.write_recipe(tmp_path, tied_model))
    facts = ask_training.main([path, "model.attention=sdpa"])
    assert 0 <= facts["difference"] < 1e-5
    group = Group("recipe")
    assert verdicts(training_findings(answered(facts), group)) == {"attention": "ok", "compile": "ok"}
    assert facts["compiled"] is False, "on a CPU only when it is asked for"
    leaking = answered(facts | {"difference": 0.3})
    assert verdicts(training_findings(leaking, group)) == {"attention": "problem"}
    refused = ask_training.main([path, "model.attention=torch_varlen", "model.dtype=bf16"])
    assert "cannot run here" in refused["error"]
    assert verdicts(training_findings(answered(refused), group)) == {"attention": "problem"}
    wrong = tmp_path / "knobs.json"
    wrong.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 8}')
    liger = ask_training.main([path, "model.kernels=liger"])
    assert "model.kernels='liger' runs on CUDA devices" in liger["error"]
    knobs = ask_training.main([path, "train.engine=zero2", f"train.deepspeed={wrong}"])
    assert "train_batch_size" in knobs["error"]


# Trials, for real.


def test_two_processes_sum_and_train_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's leavings do not disturb them: the environment's group tells of those."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = try_all_reduce(num_gpus=0)
    assert found.verdict is Verdict.OK, found
    assert "2 processes over gloo" in found.seen
    found = try_smoke_run(num_gpus=0, engine="auto")
    assert found.verdict is Verdict.OK, found
    assert "2 processes" in found.seen


def test_a_trial_that_fails_is_a_problem_in_its_own_words() -> None:
    failed = Answer(1, "", "error: the ranks form no group", 3.0, "exit code 1: error: the ranks form no group")
    assert "the ranks form no group" in all_reduce_finding(failed).seen
    half = answered({"ranks": 1, "backend": "gloo", "seconds": 0.1})
    assert all_reduce_finding(half).verdict is Verdict.PROBLEM, "one process is no group"
    ended = Answer(0, "", "", 3.0)
    for losses in ([], [1.0, 2.0], [1.0, float("nan"), 1.0]):
        assert smoke_finding(ended, losses, engine="auto", num_processes=2).verdict is Verdict.PROBLEM
    assert smoke_finding(ended, [3.0, 2.0, 1.0], engine="auto", num_processes=2).verdict is Verdict.OK


# The report.


def test_the_table_fits_80_columns_and_says_every_word() -> None:
    long = "/a/very/long/path/" + "x" * 120
    findings = [
        Group("disk").problem("runs", f"{long}: no [room]", "delete files"),
        Group("host").ok("cores", "2 usable of 2"),
    ]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_findings(findings, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "x" * 120 in "".join(text.replace("\n", "").split()), "folded, not cut"
    assert "[room]" in "".join(text.split()), "no markup"
    assert "-> delete files" in text
    assert "1 problem, 0 warnings, 0 notes, 1 ok: mend the problems" in text


def test_a_package_that_cannot_be_imported_is_said_by_the_last_line(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": f"{broken_packages(tmp_path)}:{ROOT}"}
    answer = ask_python("doctor.ask_package", "flash_attn", timeout_s=30, environ=environ)
    assert "undefined symbol" in answer.failure
    dead = ask_python("doctor.ask_package", "flash_attn_interface", timeout_s=30, environ=environ)
    assert dead.failure.startswith("died by SIGSEGV")
