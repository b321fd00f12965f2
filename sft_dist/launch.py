"""`sft-dist launch`: start the processes of a run, turn signals into its stop file, and leave nothing behind."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from sft_dist import package_files
from sft_dist.accelerate_config import ONE, AccelerateConfig, default_path, read_accelerate_config
from sft_dist.config import Recipe
from sft_dist.engine_choice import EngineChoice, choose_engine, count_parameters, find_shape
from sft_dist.errors import ConfigError, RankLostError
from sft_dist.machine import Gpus, Route, look_for_gpus, num_numa_nodes, require_free_port, route_to
from sft_dist.run_files import LOCK, LOGS, STOP_FILE
from sft_dist.world import AT_WORK, EXIT_CODES, check_launcher_agrees, follow_parent, num_cores, prctl

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAVE_PATIENCE_S = 3600
"""How long ranks may take to save once the launcher was told to end; torchrun kills them after 30 s by itself."""

LINGER_S = 5.0
"""How long what a run started may outlive it: a tracker sends its last lines."""

END_PATIENCE_S = 30.0
"""How long it may take to end once it is told to."""

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


@dataclass(frozen=True)
class Hosts:
    """Several hosts of one run, as one of them sees them: each runs the same command with an index of its own.

    index: 0 on the host of main_host, where all others find port.
    """

    count: int
    index: int
    main_host: str
    port: int


@dataclass(frozen=True)
class Asked:
    """What the flags of `sft-dist launch` ask for; None is left to it. num_processes: on each host."""

    num_processes: int | None = None
    num_hosts: int | None = None
    host_index: int | None = None
    main_host: str | None = None
    port: int | None = None
    config_file: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What starts a run. hosts: None for one. notes: what was decided for the user, a line each."""

    num_processes: int
    hosts: Hosts | None
    config: Path | None
    on_gpus: bool
    words: tuple[str, ...]
    settings: Mapping[str, str]
    forced_several: bool = False
    notes: tuple[str, ...] = ()

    @property
    def holds_the_lock(self) -> bool:
        """True where rank 0 will be: elsewhere it may already be at work, and hold the run's lock."""
        return self.hosts is None or self.hosts.index == 0

    def command(self, *, host_index: int | None = None) -> list[str]:
        """The command that trains. host_index: as that host runs it; None for this one."""
        hosts = self.hosts
        if hosts is not None and host_index is not None:
            hosts = replace(hosts, index=host_index)
        return command_for(
            self.words,
            num_processes=self.num_processes,
            on_gpus=self.on_gpus,
            hosts=hosts,
            config=self.config,
            forced_several=self.forced_several,
        )


def launch(recipe: Recipe, words: Sequence[str], *, asked: Asked = Asked(), dry_run: bool = False) -> int:
    """Train with `sft-dist train *words` in the processes of this host. Returns an exit code.

    words: the recipe, overrides and flags, as `train` takes them, and as `recipe` was read with.
    dry_run: print the command of every host instead.
    Raises ConfigError when another job runs in the run's directory, or when what is asked for contradicts itself.
    """
    plan = plan_launch(recipe, words, asked)
    for note in plan.notes:
        _say(note)
    if dry_run:
        print("\n".join(_to_paste(plan)))
        return 0
    if plan.hosts is not None and plan.holds_the_lock:
        require_free_port(plan.hosts.port)
    if plan.holds_the_lock:
        remove_stale_stop(recipe.run.path)
    code = supervise(
        plan.command(),
        recipe.run.path,
        num_processes=plan.num_processes,
        settings=plan.settings,
        several_hosts=plan.hosts is not None,
    )
    if code and not plan.holds_the_lock:
        _say(f"ended with exit code {code}; host 0 says why, and the logs of the ranks do: {recipe.run.path / LOGS}")
    return code


def plan_launch(recipe: Recipe, words: Sequence[str], asked: Asked) -> Plan:
    """Decide on processes, hosts, engine and environment by this machine, the user's accelerate config and the flags.

    Raises ConfigError for half of a request, and where accelerate's config contradicts the recipe.
    """
    notes = []
    own = _own_config(asked.config_file)
    if own is not None:
        notes.append(f"using your accelerate config {own.path} (--config-file takes another)")
    hides_gpus = own is not None and own.use_cpu and not os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = Gpus() if hides_gpus else look_for_gpus()
    hosts = hosts_from(asked, own)
    num_hosts = hosts.count if hosts else 1
    num_processes = asked.num_processes or (own.processes_per_host if own else None) or max(1, gpus.count)
    if gpus.count == 0:
        few = "1 process; --processes N starts more" if num_processes == 1 else f"{num_processes} processes"
        notes.append(f"no GPU: training on the CPU, in {few}")
    choice = _engine_instead_of_auto(recipe, own, num_gpus=num_processes * num_hosts, gpus=gpus)
    engine = choice.engine if choice else recipe.train.engine
    if choice:
        notes.append(choice.reason)
    if own is not None:
        check_launcher_agrees(engine, dtype=recipe.model.dtype, environ=own.told)
    route = route_to(hosts.main_host) if hosts is not None else None
    if hosts is not None and route is not None and hosts.index == 0 and not route.is_to_itself:
        notes.append(f"this host has no address {hosts.main_host}: --host-index 0 belongs on the host that has it")
    settings = settings_for(num_processes, num_cores=num_cores(), route=route, with_config=own is not None)
    if hides_gpus:
        settings["CUDA_VISIBLE_DEVICES"] = ""  # the ranks take a GPU where they see one
    if gpus.count and num_numa_nodes() > 1:
        settings["ACCELERATE_CPU_AFFINITY"] = "1"
    return Plan(
        num_processes,
        hosts,
        own.path if own is not None else None,
        gpus.count > 0,
        (*words, *(["--engine", choice.engine] if choice else [])),
        settings,
        forced_several=own is not None and own.distributed_type in ONE and num_processes * num_hosts > 1,
        notes=tuple(notes),
    )


def _own_config(file: Path | None) -> AccelerateConfig | None:
    """The accelerate config that the user named, or has at accelerate's own place."""
    if file is None:
        file = default_path()
        if not file.is_file():
            return None
    return read_accelerate_config(file)


def _engine_instead_of_auto(
    recipe: Recipe, own: AccelerateConfig | None, *, num_gpus: int, gpus: Gpus
) -> EngineChoice | None:
    """What the user's accelerate config asks for, or memory; None where the recipe decides or `auto` will do.

    num_gpus: of all hosts together.
    """
    if recipe.train.engine != "auto":
        return None
    if own is not None and own.engine is not None:
        reason = f"train.engine=auto becomes {own.engine}: your accelerate config's deepspeed_config asks for it"
        return EngineChoice(own.engine, reason)
    if not gpus.count:
        return None
    size = find_shape(recipe, may_fetch=False)
    found = size or count_parameters(recipe.model.path, revision=recipe.model.revision)
    if found is None:
        return None
    dtype = "fp32" if recipe.model.dtype == "fp32" else "bf16"  # auto is bf16 on GPUs
    return choose_engine(recipe, num_gpus=num_gpus, gpu_bytes=gpus.memory_bytes, dtype=dtype, size=found)


def hosts_from(asked: Asked, own: AccelerateConfig | None = None) -> Hosts | None:
    """The hosts that flags describe, completed by an accelerate config of several machines; None for one host.

    Raises ConfigError when they describe half of them.
    """
    if asked.num_hosts == 1:
        return None
    if own is not None and own.num_hosts > 1:
        completed = {
            "num_hosts": asked.num_hosts or own.num_hosts,
            "host_index": own.host_index if asked.host_index is None else asked.host_index,
            "main_host": asked.main_host or own.main_host,
            "port": asked.port or own.port,
        }
        asked = replace(asked, **completed)  # type: ignore[arg-type]
    count, index, main_host, port = asked.num_hosts, asked.host_index, asked.main_host, asked.port
    flags = {"--hosts": count, "--host-index": index, "--main-host": main_host, "--port": port}
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return None
    if count is None or index is None or main_host is None or port is None:
        given = ", ".join(flag for flag in flags if flag not in missing)
        raise ConfigError(f"{given} without {', '.join(missing)}; several hosts need all four, and one host none")
    if index >= count:
        raise ConfigError(f"--host-index {index} with --hosts {count}; hosts count from 0 to {count - 1}")
    return Hosts(count, index, main_host, port)


def command_for(
    words: Sequence[str],
    *,
    num_processes: int,
    on_gpus: bool,
    hosts: Hosts | None = None,
    config: Path | None = None,
    forced_several: bool = False,
) -> list[str]:
    """The command that trains: accelerate for several processes, python alone for one.

    num_processes: on each host. config: the user's own; None for ours. forced_several: although that says one.
    """
    train = ["-m", "sft_dist", "train", *words]
    num_hosts = hosts.count if hosts is not None else 1
    if num_processes * num_hosts == 1 and config is None:
        return [sys.executable, *train]
    if hosts is not None:
        shape = "accelerate/hosts.yaml"
        address = ["--main_process_ip", hosts.main_host, "--main_process_port", str(hosts.port)]
        meeting = ["--num_machines", str(hosts.count), "--machine_rank", str(hosts.index), *address]
    else:
        shape = "accelerate/gpu-8.yaml" if on_gpus else "accelerate/cpu-2.yaml"
        # In a file: nothing listens, and the port of a user's own config need not be free.
        in_file = ["--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file"]
        meeting = ["--num_machines", "1", "--main_process_port", "0", *in_file]
    # Always with a file: accelerate would else look for the one in the user's home, when it runs.
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(config or package_files.find(shape))]
    count = ["--num_processes", str(num_processes * num_hosts), *(["--multi_gpu"] if forced_several else [])]
    return [sys.executable, *accelerate, *count, *meeting, *train]


def settings_for(
    num_processes: int, *, num_cores: int, route: Route | None = None, with_config: bool = False
) -> dict[str, str]:
    """Environment of that command; what the user has set is stronger.

    num_processes: on each host. route: to the main one of several hosts; None for one host.
    """
    if num_processes == 1 and route is None and not with_config:
        return {}
    settings = {
        "OMP_NUM_THREADS": str(max(1, num_cores // num_processes)),
        "PET_SHUTDOWN_TIMEOUT": str(SAVE_PATIENCE_S),
    }
    if route is None:
        return settings | {
            "PET_LOCAL_ADDR": "127.0.0.1",  # else the host's name, which may not resolve
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the launcher's own store listens on every interface
        }
    if route.interface is None:
        return settings
    # gloo would listen where the host's name points, if anywhere. NCCL takes a bare name for a prefix: eth1 for eth10.
    return settings | {"GLOO_SOCKET_IFNAME": route.interface, "NCCL_SOCKET_IFNAME": f"={route.interface}"}


def _to_paste(plan: Plan) -> list[str]:
    """The commands of all hosts for a shell, with a comment above each where there are several."""
    if plan.hosts is None:
        return [_shell_line(plan.settings, plan.command())]
    lines = []
    for index in range(plan.hosts.count):
        settings = dict(plan.settings)
        where = ""
        if index != plan.hosts.index:
            interfaces = [name for name in INTERFACES if settings.pop(name, None)]
            where = f", where {' and '.join(interfaces)} may be another interface" if interfaces else ""
        lines += [f"# host {index}{where}", _shell_line(settings, plan.command(host_index=index))]
    return lines


def _shell_line(settings: Mapping[str, str], command: Sequence[str]) -> str:
    return shlex.join([*(f"{key}={value}" for key, value in settings.items()), *command])


def remove_stale_stop(run_dir: Path) -> None:
    """Remove a stop file that no run obeyed. Raises ConfigError when a run is there that may yet obey it."""
    if not run_dir.is_dir():
        return
    try:
        with FileLock(run_dir / LOCK, timeout=0):
            (run_dir / STOP_FILE).unlink(missing_ok=True)
    except Timeout:
        raise ConfigError(
            f"{run_dir}: another process is training here; wait for it, or choose another run.name"
        ) from None


def supervise(
    command: Sequence[str],
    run_dir: Path,
    *,
    num_processes: int = 1,
    settings: Mapping[str, str] | None = None,
    several_hosts: bool = False,
) -> int:
    """Run the command; ask it to stop through the stop file on a signal; return once all that it started has ended.

    num_processes: how many ranks the command starts here. settings: environment, weaker than what is set.
    The code returned is the ranks' own where all that matter have left it, else the command's.
    """
    before = {pid for pid, _ in descendants(os.getpid())}
    with tempfile.TemporaryDirectory(prefix="sft-dist-") as meeting, _adopting_orphans():
        codes = Path(meeting, "exit-codes")
        codes.mkdir()
        ours = {EXIT_CODES: str(codes)}
        if not several_hosts:
            ours["PET_RDZV_ENDPOINT"] = str(Path(meeting, "rendezvous"))
        stopping = _Stopping(run_dir / STOP_FILE, codes, at_work=Path(meeting, AT_WORK), may_wait=several_hosts)
        with stopping:
            supervisor = os.getpid()
            process = subprocess.Popen(
                command,
                env=dict(settings or {}) | os.environ | ours,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches every process of the terminal's group: not the ranks
                preexec_fn=lambda: _follow(supervisor),
            )
            stopping.process = process
            try:
                while process.poll() is None:
                    stopping.ask_ranks()
                    time.sleep(0.05)
            finally:
                # Ranks of a launcher that was killed have been told so by the kernel, and are saving.
                killed = process.poll() is None or process.returncode < 0
                _end_leftovers(before, patience_s=SAVE_PATIENCE_S if killed else END_PATIENCE_S)
            stopping.withdraw()
        recorded = [int(path.read_text(encoding="ascii")) for path in sorted(codes.iterdir())]
    return stopping.gave_up or true_code(process.returncode, recorded, num_processes=num_processes)


def true_code(launchers: int, recorded: Sequence[int], *, num_processes: int) -> int:
    """The exit code of a run. launchers: the launcher's, which is 1 for every failure and after every signal.

    recorded: what the ranks left. A rank that only met the death of another does not speak for it.
    """
    failures = [code for code in recorded if code]
    if failures:
        return next((code for code in failures if code != RankLostError.exit_code), failures[0])
    if len(recorded) == num_processes:
        return 0
    return launchers if launchers >= 0 else 128 - launchers


class _Stopping:
    """While entered, a stop signal makes the stop file; the launcher, which would die of it, never sees the signal.

    codes: where ranks leave their exit codes. at_work: there once they hold the lock of the run's directory; until
    then it may be another job's. may_wait: for other hosts, before there are ranks.
    """

    def __init__(self, path: Path, codes: Path, *, at_work: Path, may_wait: bool) -> None:
        self.path, self.codes, self.at_work, self.may_wait = path, codes, at_work, may_wait
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = self.made = False
        self.gave_up = 0  # else the exit code, as a shell says the signal
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> None:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._ask)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.may_wait and self.process is not None and not self._has_begun(self.process.pid):
            _say(f"{name}: ended while it waited for the other hosts; nothing has begun")
            self.gave_up = 128 + number
            self.process.kill()  # it waits in the store, where it heeds no other signal
            return
        _say(f"{name}: already stopping" if self.asked else f"{name}: all ranks finish this step, save, and stop")
        self.asked = True

    def ask_ranks(self) -> None:
        """Make the stop file if it is due."""
        if not self.asked or self.made or not self.at_work.exists():
            return
        self.made = True
        try:
            self.path.touch()
        except OSError as error:  # a full disk: the ranks understand the signal too
            _say(f"{self.path}: {error}; sending SIGTERM instead")
            if self.process is not None and self.process.poll() is None:
                self.process.terminate()

    def _has_begun(self, launcher: int) -> bool:
        """True when there are ranks, or were: at the end too the launchers of several hosts wait for each other."""
        return bool(descendants(launcher)) or any(self.codes.iterdir())

    def withdraw(self) -> None:
        """The run ended before it saw the stop file: it is for no other."""
        if self.made:
            with suppress(OSError):  # it could not even be made
                self.path.unlink(missing_ok=True)


def _say(text: str) -> None:
    """Safe in a signal handler, unlike print."""
    os.write(2, f"sft-dist launch: {text}\n".encode())


def _follow(supervisor: int) -> None:
    follow_parent(supervisor, signal.SIGTERM)


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """While entered, processes whose parent ends become children of this one, which can end them."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


def descendants(root: int) -> set[tuple[int, int]]:
    """(pid, parent) of every process below `root`, ended and unreaped ones too. Empty without /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # ended since
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found: set[tuple[int, int]] = set()
    layer = {root}
    while layer:
        children = {(pid, parent) for pid, parent in parents.items() if parent in layer} - found
        found |= children
        layer = {pid for pid, _ in children}
    return found


def _end_leftovers(before: set[int], *, patience_s: float) -> None:
    """Return when no descendant but those of `before` is left: first wait, then SIGTERM, then SIGKILL."""
    for number, wait_s in ((0, LINGER_S), (signal.SIGTERM, patience_s), (signal.SIGKILL, 10.0)):
        left = _leftovers(before)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)  # 0 is no signal
        deadline = time.monotonic() + wait_s
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = _leftovers(before)
        if not left:
            return


def _leftovers(before: set[int]) -> set[int]:
    """Descendants that run; adopted ones that have ended are reaped."""
    running = set()
    for pid, parent in descendants(os.getpid()):
        if pid in before:
            continue
        if parent == os.getpid():
            try:
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    continue
            except ChildProcessError:
                continue
        running.add(pid)
    return running
