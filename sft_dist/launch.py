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
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from sft_dist import package_files
from sft_dist.config import Recipe
from sft_dist.errors import BackendError, ConfigError, RankLostError
from sft_dist.run_files import LOCK, STOP_FILE
from sft_dist.world import EXIT_CODES, follow_parent, num_cores, prctl

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAVE_PATIENCE_S = 3600
"""How long ranks may take to save once the launcher was told to end; torchrun kills them after 30 s by itself."""

LINGER_S = 5.0
"""How long what a run started may outlive it: a tracker sends its last lines."""

END_PATIENCE_S = 30.0
"""How long it may take to end once it is told to."""

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def launch(recipe: Recipe, words: Sequence[str], *, num_processes: int | None = None, dry_run: bool = False) -> int:
    """Train with `sft-dist train *words` in `num_processes` processes on this host. Returns an exit code.

    words: the recipe, overrides and flags, as `train` takes them. num_processes: None for one per visible GPU, or one.
    dry_run: print the command instead. Raises ConfigError when another job runs in the run's directory.
    """
    num_gpus = count_gpus()
    num_processes = num_processes or max(1, num_gpus)
    command = command_for(words, num_processes=num_processes, on_gpus=num_gpus > 0)
    settings = settings_for(num_processes, num_cores=num_cores())
    if dry_run:
        print(shlex.join([*(f"{key}={value}" for key, value in settings.items()), *command]))
        return 0
    remove_stale_stop(recipe.run.path)
    return supervise(command, recipe.run.path, num_processes=num_processes, settings=settings)


def command_for(words: Sequence[str], *, num_processes: int, on_gpus: bool) -> list[str]:
    """The command that trains: accelerate for several processes, python alone for one."""
    train = ["-m", "sft_dist", "train", *words]
    if num_processes == 1:
        return [sys.executable, *train]
    # Without a config file accelerate reads the one in the user's home. The ranks meet in a file: nothing listens.
    config = package_files.find("accelerate/gpu-8.yaml" if on_gpus else "accelerate/cpu-2.yaml")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file"]
    return [*accelerate, "--num_processes", str(num_processes), *meeting, *train]


def settings_for(num_processes: int, *, num_cores: int) -> dict[str, str]:
    """Environment of that command; what the user has set is stronger."""
    if num_processes == 1:
        return {}
    return {
        "OMP_NUM_THREADS": str(max(1, num_cores // num_processes)),
        "PET_LOCAL_ADDR": "127.0.0.1",  # else the host's name, which may not resolve
        "PET_SHUTDOWN_TIMEOUT": str(SAVE_PATIENCE_S),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the launcher's own store listens on every interface
    }


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that a process started here sees. Raises BackendError when torch cannot be asked."""
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if hidden or not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    # In a process of its own: this one lives as long as the run, and torch costs seconds and memory.
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        env=environ,
    )
    if asked.returncode:
        raise BackendError(f"torch does not start, so that GPUs cannot be counted: {asked.stderr.strip()[-500:]}")
    return int(asked.stdout.split()[-1])


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
    command: Sequence[str], run_dir: Path, *, num_processes: int = 1, settings: Mapping[str, str] | None = None
) -> int:
    """Run the command; ask it to stop through the stop file on a signal; return once all that it started has ended.

    num_processes: how many ranks the command starts here. settings: environment, weaker than what is set.
    The code returned is the ranks' own where all that matter have left it, else the command's.
    """
    before = {pid for pid, _ in descendants(os.getpid())}
    with tempfile.TemporaryDirectory(prefix="sft-dist-") as meeting, _adopting_orphans():
        codes = Path(meeting, "exit-codes")
        codes.mkdir()
        ours = {EXIT_CODES: str(codes), "PET_RDZV_ENDPOINT": str(Path(meeting, "rendezvous"))}
        stopping = _Stopping(run_dir / STOP_FILE)
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
                process.wait()
            finally:
                # Ranks of a launcher that was killed have been told so by the kernel, and are saving.
                killed = process.poll() is None or process.returncode < 0
                _end_leftovers(before, patience_s=SAVE_PATIENCE_S if killed else END_PATIENCE_S)
            stopping.withdraw()
        recorded = [int(path.read_text(encoding="ascii")) for path in sorted(codes.iterdir())]
    return true_code(process.returncode, recorded, num_processes=num_processes)


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
    """While entered, a stop signal makes the stop file; the launcher, which would die of it, never sees the signal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = self.made = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> None:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._ask)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        _say(f"{name}: already stopping" if self.asked else f"{name}: all ranks finish this step, save, and stop")
        self.asked = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self.made = True
        except OSError as error:  # a full disk: the ranks understand the signal too
            _say(f"{self.path}: {error}; sending SIGTERM instead")
            if self.process is not None and self.process.poll() is None:
                self.process.terminate()

    def withdraw(self) -> None:
        """The run ended before it saw the stop file: it is for no other."""
        if self.made:
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
